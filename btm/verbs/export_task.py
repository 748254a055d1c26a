"""``btm export-task``: one ELM's training as a directory that runs on any machine; ``btm import`` brings it back."""

from pathlib import Path

from rich.console import Console

from btm.config import Config
from btm.errors import ConfigError, ForestError
from btm.exported_tasks import Resources, write_task
from btm.files import check_name
from btm.forest import Forest
from btm.plan import plan_add, plan_run
from btm.plan_steps import Step, StepKind
from btm.requests import TrainSpec
from btm.session import console_for, domain_groups, execute, existing_forest, make_context, plan_input
from btm.step_context import Context
from btm.step_specs import build_spec
from btm.verbs.add import has_text


def main(config: Config) -> None:
    """Write the task of ``config.elm`` to ``config.output``.

    Raises:
        ConfigError: If a key is missing, or the ELM is unknown.
        ForestError: If the ELM is in the forest already, or what it branches from is not there.
    """
    console = console_for(config)
    if not config.elm or not config.output:
        raise ConfigError(["btm export-task needs elm=<name> and output=<directory>"])
    elm = check_exportable(config, config.elm)
    forest = existing_forest(config)
    if elm in ("seed", *forest.domains):
        raise ForestError(f"the forest {config.forest} already has an ELM {elm!r}; remove it first")
    step, context, before = training_of(config, elm)
    if before:
        with Forest.lock(config.forest):
            _prepare(config, before, context, console)
    check_ready(step, context)
    spec = build_spec(step, context)
    assert isinstance(spec, TrainSpec)
    resources = Resources(
        num_processes=step.num_processes, num_cpus=step.num_cpus, num_gpus=step.num_gpus, num_nodes=step.num_nodes
    )
    write_task(spec, resources, forest_name=forest.manifest.name, output=Path(config.output))
    console.print(
        f"{step.name}: {step.updates:,} updates in {config.output}; `btm step {config.output}` trains it on any "
        f"machine, `btm import {config.output} forest={config.forest}` lets it join",
        markup=False,
        soft_wrap=True,
    )


def check_exportable(config: Config, elm: str) -> str:
    """Return the name of the ELM when its training can leave the forest.

    Raises:
        ConfigError: If the forest is one sparse model.
        ForestError: If it cannot be a name.
    """
    if config.ffn.is_sparse:
        raise ConfigError(
            [
                f"{config.forest} holds one model with ffn={config.ffn.layer}; only ELMs of a forest are trained "
                "elsewhere: train one with ffn=dense"
            ]
        )
    return check_name(elm)


def training_of(config: Config, elm: str) -> tuple[Step, Context, list[Step]]:
    """The training of an ELM: its step, the context of its request, and the steps that a later ELM needs before it.

    Raises:
        ConfigError: If the ELM is unknown.
    """
    originals, novel, later = domain_groups(config)
    if elm in originals:
        steps = plan_run(plan_input(config, originals, [*novel, *later]))
        context = make_context(config, originals, [*novel, *later])
        return next(step for step in steps if step.name == f"elm/{elm}"), context, []
    is_prepared = (Path(config.forest) / "corpus" / elm / "corpus.json").is_file()
    if not has_text(config, elm) and not is_prepared:
        raise ConfigError(
            [
                f"elm must be a domain of this forest ({', '.join([*originals, *later])}), or a new one with "
                f"data.path=<text>, got {elm!r}"
            ]
        )
    config = config.model_copy(update={"domain": elm})
    steps = plan_add(plan_input(config, existing_forest(config).domains, []), elm, num_original_domains=len(originals))
    training = next(step for step in steps if step.name == f"elm/{elm}")
    before = [step for step in steps if step.kind not in (StepKind.train, StepKind.joining)]
    return training, make_context(config, originals, []), before


def check_ready(step: Step, context: Context) -> None:
    """Refuse a training whose seed model is not there.

    Raises:
        ForestError: If it is not.
    """
    for need in {"prepare", "seed", *step.needs}:
        result = context.run_dir(need) / "result.json"
        if need == "prepare":
            result = context.forest_dir / "corpus" / "prepare.json"
        if need in ("prepare", "seed") and not result.is_file():
            raise ForestError(
                f"{step.name} needs {need}, which is not finished; `btm step steps=[prepare,seed]` or `btm run` does it"
            )


def _prepare(config: Config, steps: list[Step], context: Context, console: Console) -> None:
    Forest.open(config.forest).clean()
    execute(steps, context, console)
