"""What the executor can give out, and whether what is asked of it can be."""

import difflib
from collections.abc import Sequence

from btm.config import Config
from btm.config_launch import ExecutorName
from btm.errors import ConfigError
from btm.plan_steps import Machine
from launch.resources import available_cores, available_gpus
from launch.slurm_options import SlurmOptions, options_problems


def machine(config: Config) -> Machine:
    """What the executor can give out: this machine, or the groups of a cluster."""
    launch = config.launch
    if launch.executor is ExecutorName.slurm:
        slurm_options(config)
        nodes = launch.slurm.num_nodes or launch.nodes_per_elm
        cpus, gpus = launch.slurm.cpus_per_node or launch.cpus_on_one_node, launch.slurm.gpus_per_node
        gpus = launch.gpus_per_elm // launch.nodes_per_elm if gpus is None else gpus
        return Machine(num_cpus=nodes * cpus, num_gpus=nodes * gpus, num_nodes=nodes)
    if launch.nodes_per_elm > 1 and launch.executor is ExecutorName.ray and launch.ray_address:
        return Machine(num_cpus=launch.cpus_per_elm, num_gpus=launch.gpus_per_elm, num_nodes=launch.nodes_per_elm)
    if launch.num_groups and launch.executor is ExecutorName.ray and launch.ray_address:
        groups = launch.num_groups
        return Machine(num_cpus=groups * launch.cpus_per_elm, num_gpus=groups * launch.gpus_per_elm)
    here = Machine(num_cpus=len(available_cores()), num_gpus=len(available_gpus()))
    problems = [
        f"launch.{key} must be at most {have} on this machine, got {wanted}"
        for key, wanted, have in (
            ("cpus_per_elm", launch.cpus_on_one_node, here.num_cpus),
            ("gpus_per_elm", launch.gpus_per_elm // launch.nodes_per_elm, here.num_gpus),
        )
        if wanted > have
    ]
    for elm in (elm for group in launch.groups.values() for elm in group.elms):
        size = launch.size_of(elm, num_processes=config.engine.num_processes)
        if size.num_cpus // size.num_nodes > here.num_cpus or size.num_gpus // size.num_nodes > here.num_gpus:
            problems.append(
                f"launch.groups asks for {size.num_cpus} cores and {size.num_gpus} GPUs for {elm!r}, this machine has "
                f"{here.num_cpus} and {here.num_gpus}"
            )
    if problems:
        raise ConfigError(problems)
    return here


def check_groups(config: Config, domains: Sequence[str]) -> None:
    """Refuse groups of ELMs that nobody knows.

    Args:
        config: Holds the groups.
        domains: All that have an ELM or may get one.

    Raises:
        ConfigError: Naming them, with the nearest known ones.
    """
    known = [*dict.fromkeys(domains), *([config.domain] if config.domain else [])]
    problems = []
    for name, group in config.launch.groups.items():
        for elm in group.elms:
            if elm not in known:
                near = difflib.get_close_matches(elm, known, n=1, cutoff=0.5)
                hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
                problems.append(f"launch.groups.{name}.elms names {elm!r}, which is no ELM of this forest; {hint}")
    if problems:
        raise ConfigError(problems)


def slurm_options(config: Config) -> SlurmOptions:
    """How jobs are submitted.

    Raises:
        ConfigError: If the values contradict each other.
    """
    given = config.launch.slurm
    options = SlurmOptions(
        partition=given.partition,
        account=given.account,
        qos=given.qos,
        time_s=given.time_s,
        grace_s=given.grace_s,
        max_requeues=given.max_requeues,
        more=tuple(given.more),
    )
    if problems := options_problems(options):
        raise ConfigError([f"launch.slurm: {problem}" for problem in problems])
    return options
