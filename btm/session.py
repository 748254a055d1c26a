"""What the commands that run steps share: executor, context, plan printing, and the config stored in a forest."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console

from btm.budget import divide_updates, model_size
from btm.config import Config
from btm.config_launch import ExecutorName
from btm.config_parse import config_to_dict
from btm.errors import ConfigError, ForestError, RunError
from btm.files import read_json, write_json
from btm.forest import Forest
from btm.machine import check_groups, machine, slurm_options
from btm.orchestrator import Orchestrator, Outcome
from btm.plan_steps import PlanInput, Step
from btm.step_context import Context
from btm.tracking import make_tracker
from launch.task import Executor

_PRELOAD = ("torch", "transformers", "btm.train.worker", "btm.evaluate.score")
"""Imported once by the fork server; every step then starts in milliseconds."""
_COMMON_ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gpt2", "gpt_neox", "opt", "phi")
"""Need no question to transformers, which takes seconds to load."""
_FREE_KEYS = ("dry_run", "allow_config_change", "domain", "json", "launch", "tracking", "merge", "ensemble", "evaluate")
_FREE_KEYS += ("generate", "branch", "baselines", "forest", "steps", "element", "elm", "output", "task", "action")
"""Parts of the configuration that may change between two runs on one forest."""


def domain_groups(config: Config) -> tuple[list[str], list[str], list[str]]:
    """Names of the domains that get an ELM, that are only evaluated, and that join later.

    Raises:
        ConfigError: If there is no domain to train on.
    """
    data = config.data
    domains, novel, later = list(data.domains), list(data.novel), list(data.add_later)
    if data.local_text:
        from btm.corpus.local_text import HELD_BACK, NAMES

        domains += [name for name in NAMES if name != HELD_BACK]
        later.append(HELD_BACK)
    if not domains:
        raise ConfigError(
            ["no domain to train on; give data.domains.<name>=<path>, data.directory=<folder>, or use `btm demo`"]
        )
    return domains, novel, later


def plan_input(config: Config, domains: Sequence[str], novel: Sequence[str]) -> PlanInput:
    """Everything that the plan depends on.

    Raises:
        ConfigError: If the machine is too small, transformers has no such architecture, or a group names no ELM.
    """
    check_architecture(config)
    originals, _, later = domain_groups(config)
    check_groups(config, [*originals, *later, *domains])
    return PlanInput(
        config=config,
        machine=machine(config),
        size=model_size(config.model, config.tokenizer.vocab_size),
        domains=domains,
        novel=novel,
    )


def check_architecture(config: Config) -> None:
    """Ask transformers about an uncommon ``model.arch`` before anything runs.

    Raises:
        ConfigError: If transformers does not know it (naming the nearest), or it does not take the sizes.
    """
    if config.model.path or config.model.arch in _COMMON_ARCHITECTURES:
        return
    from btm.model.architecture import transformers_config

    transformers_config(config.model, vocab_size=config.tokenizer.vocab_size, eos_id=0)


def make_context(config: Config, domains: Sequence[str], novel: Sequence[str], **more: Any) -> Context:
    """Context for the specs of a run; the budget is divided by the domains of the first round."""
    originals, _, _ = domain_groups(config)
    return Context(
        config=config,
        forest_dir=Path(config.forest),
        updates=divide_updates(config.train, len(originals)),
        domains=list(domains),
        novel=list(novel),
        **more,
    )


def slurm_state_dir(config: Config) -> Path:
    """Where the jobs of a forest get their requests and say how they went."""
    return Path(config.forest) / "slurm"


@contextmanager
def executor(config: Config) -> Iterator[Executor]:
    """The executor of ``config.launch``; everything it started has ended when the block ends.

    Raises:
        RunError: If this machine has no Slurm to submit to, or it cannot be used.
    """
    launch = config.launch
    if launch.executor is ExecutorName.slurm:
        with _slurm_executor(config) as jobs:
            yield jobs
        return
    if launch.executor is ExecutorName.ray:
        from launch.ray_executor import RayExecutor

        made: Executor = RayExecutor(
            address=launch.ray_address,
            num_groups=launch.num_groups,
            dashboard=launch.ray_dashboard,
            preload=_PRELOAD,
        )
    else:
        from launch.local import LocalExecutor

        made = LocalExecutor(num_groups=launch.num_groups, preload=_PRELOAD)
    try:
        yield made
    finally:
        made.close()


@contextmanager
def _slurm_executor(config: Config) -> Iterator[Executor]:
    from launch.slurm_commands import SlurmError
    from launch.slurm_executor import SlurmExecutor

    try:
        with SlurmExecutor(
            slurm_state_dir(config),
            options=slurm_options(config),
            num_groups=config.launch.num_groups,
            poll_s=config.launch.slurm.poll_s,
        ) as made:
            yield made
    except SlurmError as error:
        raise RunError(str(error)) from None


def execute(steps: Sequence[Step], context: Context, console: Console) -> Outcome:
    """Run ``steps`` to their end.

    Raises:
        RunError: If a step failed for good.
        StoppedError: If the user stopped the run.
    """
    from btm.display import RunDisplay

    config = context.config
    check_nodes(steps, context)
    tracker = make_tracker(config.tracking, forest_name=config.name, forest_dir=context.forest_dir)
    try:
        with executor(config) as where, RunDisplay(console) as display:
            outcome = Orchestrator(steps, context, where, display).run(tracker)
    finally:
        tracker.close()
    outcome.raise_for_failures()
    return outcome


def check_nodes(steps: Sequence[Step], context: Context) -> None:
    """Refuse trainings on several nodes that are still to be done where the executor has only this machine.

    Raises:
        ConfigError: Naming the first of them.
    """
    launch = context.config.launch
    if launch.executor is ExecutorName.slurm or (launch.executor is ExecutorName.ray and launch.ray_address):
        return
    for step in steps:
        if step.num_nodes > 1 and not (context.run_dir(step.name) / "result.json").is_file():
            raise ConfigError(
                [
                    f"{step.name} runs on {step.num_nodes} nodes (launch.nodes_per_elm), launch={launch.executor} has "
                    "this machine alone; use launch=slurm, or launch=ray with launch.ray_address=<host:port>"
                ]
            )


def store_config(config: Config) -> None:
    """Write ``config.json`` into the forest; refuse to go on with another configuration than it was begun with.

    Raises:
        ConfigError: Listing each difference, unless ``allow_config_change=true``.
    """
    path = Path(config.forest) / "config.json"
    new = config_to_dict(config)
    if path.is_file() and not config.allow_config_change:
        differences = config_differences(read_json(path), new)
        if differences:
            hint = "allow_config_change=true goes on all the same; another forest=... begins anew"
            raise ConfigError([*differences, f"{config.forest} was begun with these values; {hint}"])
    write_json(path, new)


def config_differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """Describe the keys whose values differ, without those that may change between runs."""
    found = []
    for key in sorted({*old, *new}):
        if not prefix and key in _FREE_KEYS:
            continue
        before, after = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            found += config_differences(before, after, f"{prefix}{key}.")
        elif before != after:
            found.append(f"{prefix}{key}: the forest has {before!r}, got {after!r}")
    return found


def existing_forest(config: Config) -> Forest:
    """The forest that a command works on.

    Raises:
        ForestError: If there is none.
    """
    return Forest.open(config.forest)


def required_domain(config: Config, verb: str) -> str:
    """The ``domain=`` of a command.

    Raises:
        ConfigError: If it was not given.
    """
    if not config.domain:
        raise ConfigError([f"btm {verb} needs domain=<name>"])
    return config.domain


def console_for(config: Config) -> Console:
    """Where people read: standard error when JSON goes to standard output."""
    return Console(stderr=config.output_json, soft_wrap=False, width=None if os.isatty(1) else 120)


def check_writable(path: Path) -> None:
    """Refuse a forest directory that cannot be written, before anything runs.

    Raises:
        ForestError: If ``path`` or its nearest existing parent is not a writable directory.
    """
    nearest = path
    while not nearest.exists() and nearest != nearest.parent:
        nearest = nearest.parent
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        raise ForestError(
            f"{path} cannot be written ({nearest} is not a writable directory); choose another forest=..."
        )
