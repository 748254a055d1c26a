"""A training taken out of its forest: a directory that holds all it needs, and nothing that it finds elsewhere.

    README.md  task.json  tokenizer/  corpus/<domain>/...  runs/<parent>/checkpoints/step-N/ (or the branch's model)
    runs/elm/<name>/: what the training writes; trained.json, when it has ended: the checksum of every file of it

Files lie where they lie in the forest, and a request's hash does not depend on where that is: the one that is run here
is the one that the forest would have run.
"""

import datetime
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from btm.corpus.shards import shard_paths
from btm.corpus.tokenizer import tokenizer_sha256
from btm.errors import ForestError
from btm.files import check_name, directory_in_one_step, read_json, sha256_of_file, write_atomic
from btm.records import StoredModel, TrainResult
from btm.requests import TokenSource, TrainSpec
from btm.schema import Model
from btm.version import __version__

SCHEMA_VERSION = 1
TASK_FILE, TRAINED_FILE = "task.json", "trained.json"
_ROOT = "<forest>"
_STEP_PREFIX = "elm/"


class Resources(Model):
    """What the training shall run on; other counts of processes or cores round differently."""

    num_processes: int
    num_cpus: int
    num_gpus: int
    num_nodes: int = 1


class ExportedTask(StoredModel):
    """``task.json``."""

    schema_version: Literal[1] = SCHEMA_VERSION
    program_version: str
    forest: str
    """Name of the forest."""
    elm: str
    request: dict[str, Any]
    """A :class:`btm.requests.TrainSpec`; paths begin with ``<forest>``, which is this directory."""
    resources: Resources
    tokenizer_sha256: str
    inputs: dict[str, str]
    """File that the training reads, relative to this directory -> SHA-256."""
    created: str
    """UTC time, ISO 8601."""

    @property
    def step(self) -> str:
        """Name of the step of the plan."""
        return _STEP_PREFIX + self.elm

    def spec(self, directory: Path) -> TrainSpec:
        """The request in the directory of the task.

        Raises:
            ForestError: If it is not a request, or would read or write outside of ``directory``.
        """
        try:
            spec = TrainSpec.placed(self.request, str(directory))
        except ValidationError as error:
            raise ForestError(
                f"{directory / TASK_FILE}: the request is damaged ({error.errors()[0]['msg']}); export the task again"
            ) from None
        places = [spec.output_dir, spec.tokenizer_dir, spec.start.path, spec.model.path]
        places += [source.prefix for source in (*spec.sources, *spec.dev)]
        for place in filter(None, places):
            if ".." in Path(place).parts or not Path(place).is_relative_to(directory):
                raise ForestError(
                    f"{directory / TASK_FILE}: {place} is outside of the task's directory; export it again"
                )
        if spec.output_dir != str(directory / "runs" / self.step) or spec.name != self.step:
            raise ForestError(f"{directory / TASK_FILE}: the request is not that of ELM {self.elm!r}; export it again")
        return spec


class TrainedTask(StoredModel):
    """``trained.json``: what a finished training left, to be noticed when it has changed on its way."""

    spec_sha256: str
    files: dict[str, str]
    """File relative to the run's directory -> SHA-256."""


def portable_spec(spec: TrainSpec) -> TrainSpec:
    """The request with everything inside its forest: a pretrained seed is taken from the forest's copy of it."""
    if spec.model.path is None:
        return spec
    model = spec.model.model_copy(update={"path": str(Path(spec.root) / "seed")})
    return spec.model_copy(update={"model": model})


def write_task(spec: TrainSpec, resources: Resources, *, forest_name: str, output: Path) -> ExportedTask:
    """Copy what the training ``spec`` needs into the new directory ``output``, in one step.

    Raises:
        ForestError: If ``output`` holds something, or a file that is needed is missing.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ForestError(f"{output} exists already; choose another output=, or remove it")
    root, spec = Path(spec.root), portable_spec(spec)
    files = sorted({path.relative_to(root).as_posix() for path in _inputs(spec)})
    with directory_in_one_step(output) as folder:
        hashes = {}
        for name in files:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(root / name, folder / name)
            hashes[name] = sha256_of_file(folder / name)
        task = ExportedTask(
            program_version=__version__,
            forest=forest_name,
            elm=spec.name.removeprefix(_STEP_PREFIX),
            request=spec.portable(),
            resources=resources,
            tokenizer_sha256=tokenizer_sha256(folder / "tokenizer"),
            inputs=hashes,
            created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        )
        task.save(folder / TASK_FILE)
        write_atomic(folder / "README.md", _readme(task, spec))
    return task


def open_task(directory: Path) -> ExportedTask:
    """Read the task in ``directory``.

    Raises:
        ForestError: If there is none, it is damaged, or a newer version of this program wrote it.
    """
    path = directory / TASK_FILE
    if not path.is_file():
        raise ForestError(f"{directory} holds no exported task (no {TASK_FILE}); `btm export-task` makes one")
    raw = read_json(path)
    version = raw.get("schema_version") if isinstance(raw, dict) else None
    if not isinstance(version, int) or version > SCHEMA_VERSION:
        raise ForestError(
            f"{path} has schema version {version!r}, this program reads up to {SCHEMA_VERSION}; update the program"
        )
    task = ExportedTask.load(path)
    check_name(task.elm)
    for name in task.inputs:
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise ForestError(f"{path}: the input {name!r} is outside of the task's directory; export it again")
    task.spec(directory)
    return task


def check_inputs(task: ExportedTask, directory: Path, *, owner: str) -> None:
    """Compare the files that the training reads with those that were exported.

    Args:
        task: The task.
        directory: Where they lie: the directory of the task, or its forest.
        owner: Who has them, for the message.

    Raises:
        ForestError: Naming each one that is missing or differs.
    """
    problems = []
    for name, expected in task.inputs.items():
        path = directory / name
        if not path.is_file():
            problems.append(f"{name} is missing")
        elif sha256_of_file(path) != expected:
            problems.append(f"{name} differs")
    if problems:
        what = "; ".join(problems[:4]) + (f"; and {len(problems) - 4} more" if problems[4:] else "")
        raise ForestError(f"{owner} does not have what the task was exported with: {what}")


def seal(task: ExportedTask, directory: Path) -> TrainedTask:
    """Note the checksums of a finished training."""
    run = directory / "runs" / task.step
    files = {path.relative_to(run).as_posix(): sha256_of_file(path) for path in _outputs(run)}
    trained = TrainedTask(spec_sha256=TrainResult.load(run / "result.json").spec_sha256, files=files)
    trained.save(directory / TRAINED_FILE)
    return trained


def check_trained(task: ExportedTask, directory: Path) -> TrainResult:
    """Compare what the training left with its checksums.

    Raises:
        ForestError: If it has not ended, or a file is missing, differs or was added since.
    """
    run = directory / "runs" / task.step
    if not (directory / TRAINED_FILE).is_file():
        raise ForestError(f"{directory} is not trained yet; `btm step {directory}` trains it, or goes on")
    trained = TrainedTask.load(directory / TRAINED_FILE)
    found = {path.relative_to(run).as_posix(): path for path in _outputs(run)}
    problems = [f"{name} is missing" for name in trained.files if name not in found]
    problems += [f"{name} was added" for name in found if name not in trained.files]
    problems += [
        f"{name} differs"
        for name, expected in trained.files.items()
        if name in found and sha256_of_file(found[name]) != expected
    ]
    if problems:
        raise ForestError(
            f"{run} is not what `btm step` left there: {'; '.join(problems[:4])}; copy it again from where it was "
            "trained, or train it again"
        )
    result = TrainResult.load(run / "result.json")
    spec = task.spec(directory)
    if result.spec_sha256 != spec.sha256 or trained.spec_sha256 != spec.sha256:
        raise ForestError(f"{run} is the result of another request than {directory / TASK_FILE}; train it again")
    return result


def request_differences(asked: TrainSpec, task: ExportedTask) -> list[str]:
    """What the forest would ask for in another way than the task does; one line each."""
    wanted, found = dict(_leaves(asked.portable())), dict(_leaves(task.request))
    return [
        f"{key}: the forest asks for {wanted.get(key, 'nothing')!r}, the task has {found.get(key, 'nothing')!r}"
        for key in sorted(wanted.keys() | found.keys())
        if wanted.get(key) != found.get(key)
    ]


def _inputs(spec: TrainSpec) -> Iterable[Path]:
    """Every file that the training reads.

    Raises:
        ForestError: If what it starts from is not there.
    """
    for source in (*spec.sources, *spec.dev):
        yield from _source_files(source)
    yield from _files_in(Path(spec.tokenizer_dir))
    if spec.model.path is not None:
        yield from _files_in(Path(spec.model.path))
    if spec.start.path is None:
        return
    start = Path(spec.start.path)
    if spec.start.kind == "checkpoint":
        start = start / "checkpoints" / f"step-{spec.first_update:08d}"
    if not start.is_dir():
        raise ForestError(f"{start}, which the training branches from, is not there; `btm run` makes it again")
    yield from _files_in(start)


def _source_files(source: TokenSource) -> list[Path]:
    info = Path(source.prefix).parent / "corpus.json"
    return [*shard_paths(source.prefix), *([info] if info.is_file() else [])]


def _files_in(directory: Path) -> list[Path]:
    return [path for path in directory.rglob("*") if path.is_file() and not path.is_symlink()]


def _outputs(run: Path) -> list[Path]:
    """The files of a finished training that a forest takes over."""
    single = [run / "result.json", run / "metrics.jsonl"]
    return [path for path in [*_files_in(run / "model"), *_files_in(run / "checkpoints"), *single] if path.is_file()]


def _leaves(value: Any, path: str = "") -> Iterable[tuple[str, Any]]:
    if not isinstance(value, dict | list) or not value:
        yield path, value
        return
    for key, child in value.items() if isinstance(value, dict) else enumerate(value):
        yield from _leaves(child, f"{path}.{key}" if path else str(key))


def _readme(task: ExportedTask, spec: TrainSpec) -> str:
    need = task.resources
    return f"""# ELM {task.elm} of the forest {task.forest}

One training of {spec.last_update - spec.first_update:,} updates, with all that it needs. On any machine with
branch-train-merge {task.program_version}:

```bash
btm step .        # in this directory; or btm step <path of it>
```

It takes {need.num_processes} process(es), {need.num_cpus} core(s) and {need.num_gpus} GPU(s).
Killed, it goes on from its last checkpoint when the same command is typed again; TERM makes it write one first.
When it says that it is finished, bring this directory back and let the ELM join:

```bash
btm import <path of this directory> forest=<the forest>
```

The weights are those that training in place gives, to the last bit, on a machine of the same kind with as many cores.
"""
