"""Real training processes: forked from the test process, so that one is ready in milliseconds."""

import json
import os
import signal
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from btm.requests import TrainSpec
from btm.train import worker
from tests.btm import chosen_moments
from tests.btm.chosen_moments import wait

TIMES = ("time", "train/tokens_per_s", "train/flops_per_s", "train/peak_share")


def start(spec: TrainSpec, *, before: Callable[[], None] | None = None, env: Mapping[str, str] | None = None) -> int:
    """Start one worker process; returns its process id. ``before`` runs in it first."""
    output = Path(spec.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    spec.save(output / "spec.json")

    def work() -> int:
        if before is not None:
            before()
        return worker.main([str(output / "spec.json")])

    return fork(work, log=output / "log.txt", env={"OMP_NUM_THREADS": "1"} | dict(env or {}))


def fork(work: Callable[[], int | None], *, log: Path, env: Mapping[str, str]) -> int:
    """Run ``work`` with one thread in a child whose exit code is what it returns."""

    def alone() -> int | None:
        torch.set_num_threads(1)
        return work()

    return chosen_moments.fork(alone, log=log, env=env)


def run(spec: TrainSpec, **options: Any) -> int:
    """Run one worker to its end; returns its exit code."""
    return wait(start(spec, **options))


def rank_environments(world: int, rendezvous: Path) -> list[dict[str, str]]:
    """What the launcher gives to each process of a group."""
    shared = {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world), "RENDEZVOUS_FILE": str(rendezvous)}
    return [shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(world)]


def start_group(
    spec: TrainSpec, world: int, *, before: Callable[[int], None] | None = None, attempt: int = 0
) -> list[int]:
    """Start the worker as a group of processes; returns their process ids by rank."""
    rendezvous = Path(spec.output_dir).with_name(f"{spec.name}-rendezvous-{attempt}")
    return [
        start(spec, env=env, before=None if before is None else (lambda rank=rank: before(rank)))
        for rank, env in enumerate(rank_environments(world, rendezvous))
    ]


def run_group(spec: TrainSpec, world: int, **options: Any) -> list[int]:
    """Run a group to its end; returns the exit codes by rank."""
    return [wait(pid) for pid in start_group(spec, world, **options)]


def only(victim: int, act: Callable[[], None]) -> Callable[[int], None]:
    """``before`` of a group in which one rank alone does something first."""
    return lambda rank: act() if rank == victim else None


def kill(pid: int) -> int:
    """End a process as an out-of-memory killer does; returns its exit code."""
    os.kill(pid, signal.SIGKILL)
    return wait(pid)


def wait_for(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    """Wait until ``condition`` holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.005)


def die_behind_checkpoint(spec: TrainSpec, num_calls: int = 0) -> None:
    """End this process ``num_calls`` calls of functions after a checkpoint that is not there yet."""
    before = last_checkpoint(spec)
    chosen_moments.at_call(num_calls, lambda: last_checkpoint(spec) > before)


def rows(spec: TrainSpec) -> list[dict[str, Any]]:
    """Metric rows without times."""
    lines = (Path(spec.output_dir) / "metrics.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if key not in TIMES} for line in lines]


def log(spec: TrainSpec) -> str:
    """Everything that the processes of a run said."""
    return (Path(spec.output_dir) / "log.txt").read_text()


def step_dir(spec: TrainSpec, update: int) -> Path:
    """Directory of a checkpoint."""
    return Path(spec.output_dir) / "checkpoints" / f"step-{update:08d}"


def outcome(spec: TrainSpec) -> dict[str, Any]:
    """Everything that must not depend on kills: weights, optimizer, metrics, counts."""
    output = Path(spec.output_dir)
    files = [step_dir(spec, spec.last_update) / name for name in ("model.safetensors", "optimizer.safetensors")]
    result = json.loads((output / "result.json").read_text())
    ledger = {key: value for key, value in result["ledger"].items() if key != "seconds"}
    kept = {key: value for key, value in result.items() if key not in ("ledger", "model_dir", "spec_sha256", "name")}
    return {
        "files": [path.read_bytes() for path in [*files, output / "model" / "model.safetensors"]],
        "rows": rows(spec),
        "result": kept | ledger,
    }


def last_checkpoint(spec: TrainSpec) -> int:
    """Update of the newest checkpoint; -1 when there is none."""
    names = [path.name for path in (Path(spec.output_dir) / "checkpoints").glob("step-*")]
    return max((int(name.removeprefix("step-")) for name in names), default=-1)
