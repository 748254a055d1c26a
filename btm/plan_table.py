"""A plan as tables: what runs, on how much of the machine, with how many tokens, FLOPs, bytes and seconds."""

from collections.abc import Sequence

from rich.table import Table

from btm.config import Config
from btm.config_model import EngineName
from btm.plan_steps import PlanInput, Step, StepKind
from btm.tables import format_bytes, format_count, format_duration, format_flops, key_value_table, rows_table

_CPU_FLOPS_PER_CORE = 1.5e11
_GPU_FLOPS = 2.0e14
"""Training FLOP/s assumed for the estimate; real speed depends on the model and the device."""


def plan_tables(steps: Sequence[Step], config: Config, given: PlanInput) -> list[Table]:
    """The steps with their budgets, and the totals of each model under comparison."""
    return [_steps_table(steps), _totals_table(steps, config, given)]


def estimated_seconds(step: Step) -> float:
    """Rough wall-clock of a step from its FLOPs; 2 seconds of start-up and writing."""
    speed = step.num_gpus * _GPU_FLOPS or step.num_cpus * _CPU_FLOPS_PER_CORE
    return 2.0 + step.flops / speed


def makespan_seconds(steps: Sequence[Step], num_cpus: int) -> float:
    """Estimated wall-clock of a plan: list scheduling of its steps on ``num_cpus`` cores."""
    end: dict[str, float] = {}
    running: list[tuple[float, int]] = []
    now, free = 0.0, num_cpus
    waiting = list(steps)
    while waiting or running:
        for step in list(waiting):
            needs = min(step.num_cpus, num_cpus) if step.kind is not StepKind.joining else 0
            if needs <= free and all(end.get(name, 0.0) <= now for name in step.needs):
                if any(name not in end and any(s.name == name for s in waiting) for name in step.needs):
                    continue
                end[step.name] = now + (estimated_seconds(step) if needs else 0.0)
                running.append((end[step.name], needs))
                free -= needs
                waiting.remove(step)
        running.sort()
        now, released = running.pop(0)
        free += released
    return now


def _steps_table(steps: Sequence[Step]) -> Table:
    headings = ("step", "needs", "processes", "cores", "GPUs", "updates", "tokens", "FLOPs", "disk", "time")
    rows = [
        (
            step.name,
            _some(step.needs),
            step.num_processes if step.num_nodes == 1 else f"{step.num_processes} on {step.num_nodes} nodes",
            step.num_cpus,
            step.num_gpus,
            f"{step.updates:,}" if step.updates else "",
            format_count(step.tokens) if step.tokens else "",
            format_flops(step.flops) if step.flops else "",
            format_bytes(step.disk_bytes) if step.disk_bytes else "",
            format_duration(estimated_seconds(step)),
        )
        for step in steps
        if step.kind is not StepKind.joining
    ]
    return rows_table(headings, rows, title="plan")


def _some(names: Sequence[str]) -> str:
    return (", ".join(names[:2]) + (f" + {len(names) - 2}" if len(names) > 2 else "")) or "-"


def _totals_table(steps: Sequence[Step], config: Config, given: PlanInput) -> Table:
    by_name = {step.name: step for step in steps}
    elm_tokens = sum(step.tokens for step in steps if step.name.startswith("elm/"))
    size = given.size_of("sparse") if config.ffn.is_sparse else given.size
    values: dict[str, object] = {"parameters per model": format_count(size.num_parameters)}
    if config.ffn.is_sparse:
        met = format_count(size.num_matmul_parameters)
        values["parameters per model"] = f"{format_count(size.num_parameters)}, a token meets {met} in matrices"
    else:
        values["ELMs at the same time"] = _most_at_once(steps, config, given)
    for name, group in config.launch.groups.items():
        one = config.launch.size_of(group.elms[0], num_processes=config.engine.num_processes)
        parts = f"{one.num_processes} processes, {one.num_cpus} cores, {one.num_gpus} GPUs"
        parts += f" on {one.num_nodes} nodes" if one.num_nodes > 1 else ""
        values[f"group {name}"] = f"{', '.join(group.elms)}: each {parts}"
    if seed := by_name.get("seed"):
        values["tokens, seed + all ELMs"] = format_count(seed.tokens + elm_tokens)
        if dense := by_name.get("dense"):
            values["tokens, seed + dense"] = format_count(seed.tokens + dense.tokens)
    values["disk"] = format_bytes(sum(step.disk_bytes for step in steps))
    size_of_group = config.engine.expert_parallel * config.engine.tensor_parallel
    if (sparse := by_name.get("sparse")) and size_of_group > 1:
        groups_of = sparse.num_processes // size_of_group
        values["experts of a layer"] = f"shared out among {size_of_group} processes, {groups_of} times"
    if config.engine.name is EngineName.torch:
        # Each data-parallel process holds all of it, but for experts that are shared out.
        memory = format_bytes(size.training_bytes(config.engine.dtype, expert_parallel=config.engine.expert_parallel))
        values["memory of the largest training"] = f"{memory} per process, and what its activations take"
    values["FLOPs"] = format_flops(sum(step.flops for step in steps))
    values["estimated time"] = format_duration(makespan_seconds(steps, given.machine.num_cpus))
    return key_value_table(values, title="totals")


def _most_at_once(steps: Sequence[Step], config: Config, given: PlanInput) -> int:
    """ELMs that the machine holds at the same time when they are started in the order of the plan."""
    elms = [step for step in steps if step.kind is StepKind.train and step.name.startswith(("elm/", "expert/"))]
    cpus, gpus, count = given.machine.num_cpus, given.machine.num_gpus, 0
    for step in elms:
        cpus, gpus = cpus - step.num_cpus, gpus - step.num_gpus
        if cpus < 0 or gpus < 0:
            break
        count += 1
    room = given.machine.num_cpus // config.launch.cpus_per_elm
    # Where all are alike, the machine could hold more than there are.
    found = max(room, count) if not config.launch.groups else count
    return min(config.launch.num_groups or found, found)
