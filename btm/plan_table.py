"""A plan as tables: what runs, on how much of the machine, with how many tokens, FLOPs, bytes and seconds."""

from collections.abc import Sequence

from rich.table import Table

from btm.config import Config
from btm.plan import PlanInput, Step, StepKind

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
            needs = min(step.num_cpus, num_cpus) if step.kind is not StepKind.join else 0
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


def human_count(number: float, unit: str = "") -> str:
    """``1234567`` -> ``1.23 M``; with SI prefixes up to exa."""
    for prefix in ("", "k", "M", "G", "T", "P", "E"):
        if abs(number) < 1000 or prefix == "E":
            digits = 0 if prefix == "" else (2 if abs(number) < 10 else 1 if abs(number) < 100 else 0)
            return f"{number:.{digits}f} {prefix}{unit}".rstrip()
        number /= 1000
    raise AssertionError


def human_seconds(seconds: float) -> str:
    """``75`` -> ``1 min 15 s``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def _steps_table(steps: Sequence[Step]) -> Table:
    table = Table(title="plan", title_justify="left", caption_justify="left")
    for column, side in (
        ("step", "left"),
        ("needs", "left"),
        ("processes", "right"),
        ("cores", "right"),
        ("GPUs", "right"),
        ("updates", "right"),
        ("tokens", "right"),
        ("FLOPs", "right"),
        ("disk", "right"),
        ("time", "right"),
    ):
        table.add_column(column, justify="right" if side == "right" else "left", overflow="fold")
    for step in steps:
        if step.kind is StepKind.join:
            continue
        needs = ", ".join(step.needs[:2]) + (f" + {len(step.needs) - 2}" if len(step.needs) > 2 else "")
        table.add_row(
            step.name,
            needs or "-",
            str(step.num_processes),
            str(step.num_cpus),
            str(step.num_gpus),
            f"{step.updates:,}" if step.updates else "",
            human_count(step.tokens) if step.tokens else "",
            human_count(step.flops) if step.flops else "",
            human_count(step.disk_bytes, "B") if step.disk_bytes else "",
            human_seconds(estimated_seconds(step)),
        )
    return table


def _totals_table(steps: Sequence[Step], config: Config, given: PlanInput) -> Table:
    table = Table(title="totals", title_justify="left", show_header=False)
    by_name = {step.name: step for step in steps}
    seed = by_name.get("seed")
    elms = [step for step in steps if step.name.startswith("elm/")]
    rows = {
        "parameters per model": human_count(given.size.num_parameters),
        "groups of cores or GPUs": str(
            config.launch.num_groups or given.machine.num_cpus // config.launch.cpus_per_elm
        ),
    }
    if seed:
        rows["tokens, seed + all ELMs"] = human_count(seed.tokens + sum(step.tokens for step in elms))
        if dense := by_name.get("dense"):
            rows["tokens, seed + dense"] = human_count(seed.tokens + dense.tokens)
    rows["disk"] = human_count(sum(step.disk_bytes for step in steps), "B")
    rows["FLOPs"] = human_count(sum(step.flops for step in steps))
    rows["estimated time"] = human_seconds(makespan_seconds(steps, given.machine.num_cpus))
    for name, value in rows.items():
        table.add_row(name, value)
    return table
