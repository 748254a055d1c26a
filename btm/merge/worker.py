"""Run a merge: ``python -m btm.merge.worker spec.json`` runs a :class:`btm.requests.MergeSpec`.

The directory appears in one step when it is complete, then ``<output_dir>.json``; killed at any moment, a merge leaves
the old directory, none, or the whole new one.
"""

import contextlib
import errno
import fcntl
import math
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from btm.config_merge import MergeMethodName
from btm.errors import MergeError
from btm.files import directory_in_one_step, name_problem
from btm.merge.average import default_threads
from btm.merge.card import CARD_NAME, PROVENANCE_NAME, model_card, provenance
from btm.merge.compatibility import check_compatible, check_tokenizers, without_tied_copies
from btm.merge.judge import dev_judge
from btm.merge.methods import MERGE_METHODS
from btm.merge.model_files import ModelFiles, open_model
from btm.merge.output import StreamOptions, write_companions, write_weights
from btm.merge.request import MergeRequest, normalised
from btm.merge.verify import check_recorded
from btm.records import MergeResult
from btm.requests import MergeInput, MergeSpec
from btm.spec_file import run_spec_file

Judge = Callable[[Path], float]


def merge_models(
    models: Mapping[str, Path | str],
    output_dir: Path | str,
    *,
    method: MergeMethodName = MergeMethodName.uniform,
    weights: Mapping[str, float] | None = None,
    tokenizer_dir: Path | str | None = None,
) -> MergeResult:
    """Average Hugging Face directories into a new one.

    Args:
        models: Name -> directory. Sums are accumulated in alphabetical order, whatever the order here.
        output_dir: Directory to write; an existing one is replaced when the new one is complete.
        method: ``uniform`` or ``weighted``; the others need the scores of a forest, see ``btm merge``.
        weights: Name -> weight, for ``weighted``; normalised to 1.
        tokenizer_dir: Whose tokenizer to put beside the weights; None takes the first model's.

    Raises:
        MergeError: If the models cannot be averaged.
    """
    if wrong := {name: weight for name, weight in (weights or {}).items() if not math.isfinite(weight)}:
        raise MergeError(f"weights must be finite numbers of at least 0, got {wrong}")
    first = str(models[min(models)]) if models else ""
    return run_spec(
        MergeSpec(
            name=Path(output_dir).name,
            method=method,
            models=[MergeInput(name=name, directory=str(models[name])) for name in sorted(models)],
            weights=dict(weights or {}),
            tokenizer_dir=str(tokenizer_dir or first),
            output_dir=str(output_dir),
        )
    )


def run_spec(
    spec: MergeSpec, *, judge: Judge | None = None, num_threads: int | None = None, shard_bytes: int | None = None
) -> MergeResult:
    """Run one merge and write ``<output_dir>`` and ``<output_dir>.json``.

    Args:
        spec: The request; ``spec.models`` is the order of accumulation.
        judge: Directory -> dev loss, for ``greedy_soup``; None scores ``spec.dev``.
        num_threads: Threads that average; None takes the machine's. The result does not depend on it.
        shard_bytes: Largest file of weights; None is 5 GiB.

    Raises:
        MergeError: If the models cannot be averaged. The output is then as it was before.
    """
    began, output = time.monotonic(), Path(spec.output_dir)
    options = StreamOptions(memory_bytes=spec.memory_bytes, num_threads=num_threads or default_threads())
    if shard_bytes is not None:
        options = StreamOptions(
            memory_bytes=spec.memory_bytes, num_threads=options.num_threads, shard_bytes=shard_bytes
        )
    models = _open_models(spec, options.num_threads)
    _remove_dead_leftovers(output)
    weights = _weigh(spec, models, judge or dev_judge(spec), options)
    result_path = output.with_name(output.name + ".json")
    with _full_disk_as_error(output), directory_in_one_step(output) as folder, _held(folder):
        files = _write_model(spec, models, weights, folder, options)
        # A result must never describe a directory that it was not written for.
        result_path.unlink(missing_ok=True)
    result = MergeResult(spec_sha256=spec.sha256, weights=dict(weights), files=files, seconds=time.monotonic() - began)
    result.save(result_path)
    return result


def _open_models(spec: MergeSpec, num_threads: int) -> list[ModelFiles]:
    names = [model.name for model in spec.models]
    if not names:
        raise MergeError("there is no model to merge; name at least one")
    if problem := next(filter(None, map(name_problem, names)), None):
        raise MergeError(problem)
    if len(set(names)) < len(names):
        raise MergeError(f"two models have the same name among {names}; name every model once")
    _check_output(spec)
    models = [open_model(model.name, Path(model.directory)) for model in spec.models]
    check_recorded(models, spec.models, num_threads)
    models = [without_tied_copies(model) for model in models]
    check_compatible(models)
    tokenizers = [Path(spec.tokenizer_dir)] if spec.tokenizer_dir else []
    check_tokenizers([*tokenizers, *(model.directory for model in models)])
    return models


def _check_output(spec: MergeSpec) -> None:
    """Replace nothing but an earlier merge."""
    output = Path(spec.output_dir).resolve()
    for model in spec.models:
        directory = Path(model.directory).resolve()
        if directory.is_relative_to(output) or output.is_relative_to(directory):
            raise MergeError(f"the output {output} would overwrite model {model.name!r}; choose another output")
    is_free = not output.exists() or (output.is_dir() and not any(output.iterdir()))
    if not is_free and not (output / PROVENANCE_NAME).is_file():
        raise MergeError(f"{output} exists and is not a merged model (no {PROVENANCE_NAME}); choose another output")


def _weigh(
    spec: MergeSpec, models: Sequence[ModelFiles], judge: Judge | None, options: StreamOptions
) -> dict[str, float]:
    by_name = {model.name: model for model in models}

    def loss_of(names: Sequence[str]) -> float:
        assert judge is not None
        if len(names) == 1:
            return judge(by_name[names[0]].directory)
        output, chosen = Path(spec.output_dir), [by_name[name] for name in names]
        output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".tmp-{output.name}-soup-", dir=output.parent) as scratch:
            folder = Path(scratch)
            with _held(folder):
                write_weights(chosen, [1 / len(chosen)] * len(chosen), folder, options)
                write_companions(chosen[0], _tokenizer_dir(spec, chosen[0]), folder)
                return judge(folder)

    request = MergeRequest(
        names=list(by_name),
        weights=spec.weights,
        domain=spec.domain,
        score_dirs={model.name: Path(model.score_dir) for model in spec.models if model.score_dir},
        loss_of=loss_of if judge is not None else None,
    )
    weights = normalised(MERGE_METHODS[spec.method].weigh(request))
    return dict(zip(by_name, weights, strict=True))


def _write_model(
    spec: MergeSpec,
    models: Sequence[ModelFiles],
    weights: Mapping[str, float],
    folder: Path,
    options: StreamOptions,
) -> dict[str, str]:
    used = [model for model in models if weights[model.name] > 0]
    files = write_weights(used, normalised([weights[model.name] for model in used]), folder, options)
    write_companions(used[0], _tokenizer_dir(spec, used[0]), folder)
    method, dtypes = MERGE_METHODS[spec.method], [tensor.dtype for tensor in used[0].tensors.values()]
    card = model_card(spec, method, weights, used[0].config, dtypes)
    (folder / CARD_NAME).write_text(card, encoding="utf-8")
    (folder / PROVENANCE_NAME).write_text(provenance(spec, method, weights, files), encoding="utf-8")
    return files


def _tokenizer_dir(spec: MergeSpec, model: ModelFiles) -> Path | None:
    same = not spec.tokenizer_dir or Path(spec.tokenizer_dir).resolve() == model.directory.resolve()
    return None if same else Path(spec.tokenizer_dir)


@contextlib.contextmanager
def _held(folder: Path) -> Iterator[None]:
    """Lock a directory in progress, so that others can tell it from what a killed merge left."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _remove_dead_leftovers(output: Path) -> None:
    result = output.parent.glob(f".tmp-{output.name}.json-*")
    for leftover in [*output.parent.glob(f".tmp-{output.name}-*"), *result]:
        if not leftover.is_dir():
            leftover.unlink(missing_ok=True)
            continue
        with contextlib.suppress(OSError):
            descriptor = os.open(leftover, os.O_RDONLY)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(leftover, ignore_errors=True)
            finally:
                os.close(descriptor)


@contextlib.contextmanager
def _full_disk_as_error(output: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}:
            raise
        reason = os.strerror(error.errno)
        raise MergeError(f"writing {output} failed: {reason}; nothing was changed; free some space") from None


def main(arguments: Sequence[str]) -> int:
    """Run the spec file named on the command line; returns the exit code."""
    return run_spec_file(arguments, MergeSpec, run_spec)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
