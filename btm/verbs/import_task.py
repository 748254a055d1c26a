"""``btm import``: an ELM that was trained elsewhere from an exported task joins its forest, or nothing changes."""

import shutil
from collections.abc import Sequence
from pathlib import Path

from btm.config import Config
from btm.config_model import Dtype
from btm.corpus.tokenizer import tokenizer_sha256
from btm.errors import ConfigError, ForestError
from btm.exported_tasks import (
    ExportedTask,
    check_inputs,
    check_trained,
    open_task,
    portable_spec,
    request_differences,
)
from btm.files import directory_in_one_step, exclusive_lock, remove_leftovers, sha256_of_file
from btm.forest import Forest
from btm.merge.model_files import open_model
from btm.plan_steps import Step, StepKind
from btm.records import TrainResult
from btm.requests import TrainSpec
from btm.session import console_for, existing_forest
from btm.step_context import Context
from btm.step_specs import build_spec
from btm.steps import register
from btm.verbs.export_task import check_exportable, check_ready, training_of

_TAKEN_OVER = ("model", "checkpoints", "metrics.jsonl", "log.txt")


def main(config: Config) -> None:
    """Let the trained task in ``config.task`` join the forest.

    Raises:
        ConfigError: If no task is named, or the forest is one sparse model.
        ForestError: If the task is another forest's, not finished, or not what was trained.
    """
    if not config.task:
        raise ConfigError(
            ["btm import needs the directory of an exported task: btm import <directory> forest=<forest>"]
        )
    directory, console = Path(config.task).absolute(), console_for(config)
    task = open_task(directory)
    check_exportable(config, task.elm)
    with Forest.lock(config.forest):
        forest = existing_forest(config)
        if task.elm in forest.domains:
            raise ForestError(f"the forest {config.forest} already has an ELM {task.elm!r}; remove it first")
        step, spec, context = checked(config, task, directory, forest)
        forest.clean()
        with exclusive_lock(context.run_dir(step.name) / ".lock", wait=False):
            _place(task, directory, spec, context.run_dir(step.name))
        register(Step(name=f"join/{task.elm}", kind=StepKind.joining), context)
    console.print(
        f"{task.elm} joined {config.forest} from {config.task}; `btm evaluate forest={config.forest}` measures the new "
        "forest, `btm run` does what is left of a run",
        markup=False,
        soft_wrap=True,
    )


def checked(config: Config, task: ExportedTask, directory: Path, forest: Forest) -> tuple[Step, TrainSpec, Context]:
    """Compare a trained task with what the forest would have trained itself.

    Returns:
        The step, its request in the forest, and the context.

    Raises:
        ConfigError: If the forest has no such domain.
        ForestError: If tokenizer, lineage, data or recipe differ, or files have changed since the training.
    """
    if task.tokenizer_sha256 != forest.manifest.tokenizer_sha256:
        raise ForestError(
            f"{directory} was exported with tokenizer {task.tokenizer_sha256[:12]}, the forest {config.forest} has "
            f"{forest.manifest.tokenizer_sha256[:12]}; it belongs to another forest"
        )
    step, context, _ = training_of(config, task.elm)
    check_ready(step, context)
    spec = build_spec(step, context)
    assert isinstance(spec, TrainSpec)
    if differences := request_differences(portable_spec(spec), task):
        more = f" and {len(differences) - 4} more" if differences[4:] else ""
        raise ForestError(
            f"{directory} is another training than that of {task.elm!r} in {config.forest}: "
            f"{'; '.join(differences[:4])}{more}; import it into the forest that it was exported from, with the "
            "overrides that btm export-task was given"
        )
    check_inputs(task, context.forest_dir, owner=f"the forest {config.forest}")
    check_inputs(task, directory, owner=str(directory))
    result = check_trained(task, directory)
    _check_model(directory / "runs" / task.step / "model", forest, spec, result)
    return step, spec, context


def _check_model(model_dir: Path, forest: Forest, spec: TrainSpec, result: TrainResult) -> None:
    """Refuse a model of other tensors or another tokenizer than the seed's, or of another number of updates."""
    if result.updates != spec.last_update - spec.first_update:
        raise ForestError(
            f"{model_dir} has {result.updates} updates, {spec.last_update - spec.first_update} were asked"
        )
    own = forest.tokenizer_dir
    if not (model_dir / "tokenizer.json").is_file() or (
        sha256_of_file(model_dir / "tokenizer.json") != sha256_of_file(own / "tokenizer.json")
        and tokenizer_sha256(model_dir) != tokenizer_sha256(own)
    ):
        raise ForestError(
            f"{model_dir} has another tokenizer than the forest ({own}); all models of a forest share one"
        )
    seed, model = open_model("seed", forest.directory("seed")), open_model(model_dir.name, model_dir)
    shapes = {name: tensor.shape for name, tensor in model.tensors.items()}
    expected = {name: tensor.shape for name, tensor in seed.tensors.items()}
    if shapes != expected:
        names = sorted(name for name in shapes.keys() | expected.keys() if shapes.get(name) != expected.get(name))
        raise ForestError(f"{model_dir} has other tensors than the seed model: {', '.join(names[:3])}")
    _check_weights(model.weight_files, model_dir.parent / "checkpoints" / f"step-{spec.last_update:08d}", spec)


def _check_weights(files: Sequence[Path], checkpoint: Path, spec: TrainSpec) -> None:
    """Refuse weights that are not those of the last checkpoint, rounded, or not finite: the model was changed since.

    Raises:
        ForestError: Naming the first tensor.
    """
    import torch
    from safetensors.torch import load_file

    from btm.train.checkpoint import verified

    found = verified(checkpoint, spec.last_update)
    if isinstance(found, str):
        raise ForestError(f"{checkpoint} is damaged: {found}; copy it again from where it was trained")
    dtype = torch.float32 if spec.engine.dtype is Dtype.fp32 else torch.bfloat16
    masters = load_file(checkpoint / "model.safetensors")
    for path in files:
        for name, tensor in load_file(path).items():
            is_same = name in masters and tensor.dtype == dtype and torch.equal(tensor, masters[name].to(dtype))
            if not is_same or not bool(torch.isfinite(tensor).all()):
                raise ForestError(
                    f"{path}: {name} is not what the training's last checkpoint holds; the model was changed after it "
                    "was trained: copy it again, or train it again"
                )


def _place(task: ExportedTask, directory: Path, spec: TrainSpec, run_dir: Path) -> None:
    """Put the training where it would lie had it been done here, in one step."""
    trained = directory / "runs" / task.step
    remove_leftovers(run_dir.parent)
    with directory_in_one_step(run_dir) as folder:
        for name in _TAKEN_OVER:
            if (trained / name).is_dir():
                shutil.copytree(trained / name, folder / name)
            elif (trained / name).is_file():
                shutil.copyfile(trained / name, folder / name)
        spec.save(folder / "spec.json")
        result = TrainResult.load(trained / "result.json")
        result = result.model_copy(update={"spec_sha256": spec.sha256, "model_dir": str(run_dir / "model")})
        result.save(folder / "result.json")
