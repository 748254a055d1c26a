"""A plan as tables: what runs, on how much of the machine, with how many tokens, FLOPs, bytes and seconds."""

from collections.abc import Sequence

from rich.table import Table

from btm.config import Config
from btm.plan import PlanInput, Step, StepKind
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
            step.num_processes,
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
    groups = config.launch.num_groups or given.machine.num_cpus // config.launch.cpus_per_elm
    values: dict[str, object] = {
        "parameters per model": format_count(given.size.num_parameters),
        "ELMs at the same time": groups,
    }
    if seed := by_name.get("seed"):
        values["tokens, seed + all ELMs"] = format_count(seed.tokens + elm_tokens)
        if dense := by_name.get("dense"):
            values["tokens, seed + dense"] = format_count(seed.tokens + dense.tokens)
    values["disk"] = format_bytes(sum(step.disk_bytes for step in steps))
    values["FLOPs"] = format_flops(sum(step.flops for step in steps))
    values["estimated time"] = format_duration(makespan_seconds(steps, given.machine.num_cpus))
    return key_value_table(values, title="totals")
