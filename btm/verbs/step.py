"""``btm step``: single steps of a plan, run here and now, without a driver: what one element of an array job does.

``btm step <directory>`` trains the task that ``btm export-task`` wrote there, in any place and without its forest.

A training on several nodes (``launch.nodes_per_elm``) has this command on each of them, as one Slurm job step
(``sbatch --nodes=2 slurm/btm.sbatch step ...``); the first one leads.

The forest's directory is all that the elements share. Trainings of ELMs and baselines write only below
``runs/<step>/``, so any number of them may run at the same time; ``btm run`` with the same configuration then finds
them finished and does the rest. Exit code 143: it was asked to stop and has written its checkpoint.
"""

import os
import sys
from pathlib import Path

from rich.console import Console

from btm.budget import Updates
from btm.config import Config
from btm.config_parse import config_to_dict
from btm.errors import ConfigError, ForestError, RunError
from btm.exported_tasks import check_inputs, open_task, seal
from btm.files import read_json
from btm.forest import Forest
from btm.orchestrator import make_task
from btm.plan import plan_run
from btm.plan_steps import ROUTERS, PlanInput, Step, StepKind
from btm.plan_table import plan_tables
from btm.requests import SpecModel
from btm.session import (
    check_writable,
    config_differences,
    console_for,
    domain_groups,
    make_context,
    plan_input,
    store_config,
)
from btm.step_context import Context
from btm.step_specs import build_spec
from btm.steps import EXIT_PREEMPTED, is_finished, register
from btm.tables import key_value_table
from launch.logs import end_of_log
from launch.slurm_group import StopRequest
from launch.slurm_nodes import Leader, follow, leading, own_node
from launch.task import State, Status, Task

_FIRST = ("prepare", "seed")
"""Steps that change the forest itself; one process at a time."""
_LOG_LINES = 15


def main(config: Config) -> None:
    """Run the steps named by ``steps=`` or ``element=``, one after the other, or the exported task in ``task=``."""
    console, node, stop = console_for(config), own_node(os.environ), StopRequest()
    meetings = Path(config.task or config.forest).absolute() / "slurm" / "nodes"
    if node.rank:
        with stop.installed():
            follow(meetings, node, stop)
        return
    with leading(meetings, node) as leader:
        if config.task:
            run_task(config, Path(config.task).absolute(), console, leader, stop)
        else:
            run_steps(config, console, leader, stop)


def run_steps(config: Config, console: Console, leader: Leader, stop: StopRequest) -> None:
    """Run the steps that the configuration names."""
    domains, novel, later = domain_groups(config)
    given = plan_input(config, domains, [*novel, *later])
    steps = selected_steps(given)
    if config.dry_run:
        for table in plan_tables(steps, config, given):
            console.print(table)
        return
    context = make_context(config, domains, [*novel, *later])
    _check_config(config)
    with stop.installed():
        for step in steps:
            if step.name not in _FIRST:
                _run(step, context, leader, stop, console)
                continue
            with Forest.lock(context.forest_dir):
                store_config(config)
                _run(step, context, leader, stop, console)


def run_task(config: Config, directory: Path, console: Console, leader: Leader, stop: StopRequest) -> None:
    """Train the exported task in ``directory``, or go on with it, and note the checksums of what it leaves.

    Raises:
        ConfigError: If steps of a forest are named as well.
        ForestError: If it is no task, or a file that the training reads is missing or has changed.
        RunError: If the training failed for good.
    """
    if config.steps or config.element is not None:
        raise ConfigError([f"btm step runs the task in {directory} or steps of a forest, got both; leave one out"])
    task = open_task(directory)
    spec, size = task.spec(directory), task.resources
    step = Step(name=task.step, kind=StepKind.train, updates=spec.last_update - spec.first_update, **size.model_dump())
    if config.dry_run:
        facts = {"task": task.step, "of the forest": task.forest, "updates": step.updates, **size.model_dump()}
        console.print(key_value_table(facts, title=f"exported task in {directory}"))
        return
    check_inputs(task, directory, owner=str(directory))
    updates = Updates(spec.total_updates, spec.first_update, spec.batch_sequences, spec.batch_sequences)
    context = Context(config=config, forest_dir=directory, updates=updates, domains=[task.elm])
    with stop.installed():
        _run(step, context, leader, stop, console, spec=spec)
    seal(task, directory)
    console.print(f"bring {directory} back and type `btm import {directory} forest=<forest>`", markup=False)


def selected_steps(given: PlanInput) -> list[Step]:
    """The steps that the configuration names.

    Raises:
        ConfigError: If it names none, or one that cannot be run alone.
    """
    config, plan = given.config, {step.name: step for step in plan_run(given)}
    after = trainings(given)
    if config.element is not None:
        if config.element >= len(after):
            raise ConfigError(
                [f"element must be below {len(after)}, the number of trainings after the seed, got {config.element}"]
            )
        return [after[config.element]]
    allowed = [*_FIRST, *(step.name for step in after)]
    unknown = [name for name in config.steps if name not in allowed]
    if unknown or not config.steps:
        what = f"steps names {unknown}" if unknown else "btm step needs steps=[...] or element=<number>"
        raise ConfigError([f"{what}; steps that can be run alone: {', '.join(allowed)} (`btm run` does the others)"])
    return [plan[name] for name in config.steps]


def trainings(given: PlanInput) -> list[Step]:
    """The trainings that need nothing but the seed, in the order of the plan: the elements of an array job."""
    steps = [step for step in plan_run(given) if step.kind is StepKind.train]
    return [step for step in steps if step.name not in ("seed", ROUTERS)]


def _check_config(config: Config) -> None:
    """Refuse other values than the forest was begun with; only the first steps write them."""
    stored = Path(config.forest) / "config.json"
    if not stored.is_file():
        check_writable(Path(config.forest))
        Path(config.forest).mkdir(parents=True, exist_ok=True)
    elif not config.allow_config_change and (problems := config_differences(read_json(stored), config_to_dict(config))):
        raise ConfigError(problems)


def _run(
    step: Step,
    context: Context,
    leader: Leader,
    stop: StopRequest,
    console: Console,
    *,
    spec: SpecModel | None = None,
) -> None:
    _check_needs(step, context)
    spec = spec or build_spec(step, context)
    if step.kind is not StepKind.prepare and is_finished(step, spec, context):
        register(step, context)
        console.print(f"{step.name} was finished earlier")
        return
    task = make_task(step, spec, context)
    for attempt in range(context.config.launch.max_restarts + 1):
        log_start = task.log_path.stat().st_size if task.log_path.is_file() else 0
        status = _led(leader, task, stop, stop_s=0.8 * context.config.launch.slurm.grace_s)
        if status.state is State.cancelled:
            console.print(f"{step.name} was asked to stop; the same command goes on from its last checkpoint")
            sys.exit(EXIT_PREEMPTED)
        if status.state is State.succeeded and is_finished(step, spec, context):
            register(step, context)
            console.print(f"{step.name} is finished")
            return
        reason = status.reason or "it ended well but left no result"
        if status.exit_code in (1, 2) or attempt == context.config.launch.max_restarts:
            log = end_of_log(task.log_path, _LOG_LINES, start=log_start)
            raise RunError(f"{step.name} failed: {reason}\n{log}")
        console.print(f"{step.name}: {reason}; once more from its checkpoint", markup=False)


def _led(leader: Leader, task: Task, stop: StopRequest, *, stop_s: float) -> Status:
    try:
        return leader.run(task, stop, stop_s=stop_s)
    except ValueError as error:
        raise RunError(str(error)) from None


def _check_needs(step: Step, context: Context) -> None:
    for need in step.needs:
        result = context.forest_dir / "corpus" / "prepare.json"
        if need != "prepare":
            result = context.run_dir(need) / "result.json"
        if not result.is_file():
            raise ForestError(f"{step.name} needs {need}, which is not finished; run steps=[{need}] first")
