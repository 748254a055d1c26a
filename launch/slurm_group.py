"""The processes of one task as children of this process, which a scheduler may ask to stop.

Not the fork server: Slurm signals a job step as a whole (with ``proctrack/linuxproc`` every process of it), and nothing
may stand between the signal and the checkpoint but the processes that write it. They die with this process.
"""

import contextlib
import os
import secrets
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from launch.group import describe_exit
from launch.nodes import Node, ended_with_others, node_share
from launch.parent_death import DiesWithParent
from launch.process import interpreter_command, process_specs
from launch.resources import Allocation, CoreLeases, available_cores, available_gpus, private_dir
from launch.task import State, Status, Task

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP, signal.SIGINT)
_POLL_INTERVAL_S = 0.05
_ELSEWHERE_INTERVAL_S = 0.5
_FAILURE_GRACE_S = 10.0


class StopRequest:
    """Remembers that this process was asked to stop, and when."""

    def __init__(self) -> None:
        self.time: float | None = None

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """Answer all stop signals inside the block; those before it count."""
        before = {number: signal.signal(number, self._receive) for number in STOP_SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        del number, frame
        if self.time is None:
            self.time = time.monotonic()


@dataclass(slots=True)
class _Child:
    rank: int
    process: subprocess.Popen[bytes]
    exit_code: int | None = None
    order: int = 0


def run_group(
    task: Task,
    stop: StopRequest,
    *,
    stop_s: float,
    node: Node | None = None,
    has_failed_elsewhere: Callable[[], bool] = lambda: False,
) -> Status:
    """Run ``task``, or one node's share of it, to its end on the cores and GPUs that this process has.

    A stop request becomes TERM to every process, and KILL when ``stop_s`` seconds have passed. The first process that
    fails ends the others in the same way, with ten seconds.

    Args:
        task: What to run; its log is appended to.
        stop: Says when to stop.
        stop_s: Seconds that a requested stop may take.
        node: Which of the nodes of the task this one is; None where it has but one.
        has_failed_elsewhere: Whether the processes of another node have failed, which ends those of this one.

    Returns:
        ``cancelled`` when it was stopped before its end; otherwise whether all processes exited with 0.
    """
    node = node or Node()
    task = node_share(task, node.rank)
    leases = CoreLeases("slurm")
    # Where the site binds tasks to cores these are exactly as many as the task has.
    cores = leases.take(available_cores(), task.num_cpus)
    allocation = Allocation(cores=cores, gpus=available_gpus()[: task.num_gpus])
    rendezvous = private_dir() / f"rendezvous-{secrets.token_hex(8)}"
    children: list[_Child] = []
    try:
        children += _start(task, allocation, rendezvous, node)
        is_ended = _wait(children, stop, stop_s, has_failed_elsewhere)
        return ended_with_others(task.name) if is_ended else _status(task, node, children, stop)
    finally:
        for child in children:
            if child.process.poll() is None:
                child.process.kill()
                child.process.wait()
        rendezvous.unlink(missing_ok=True)
        leases.release(cores)


def _start(task: Task, allocation: Allocation, rendezvous: Path, node: Node) -> list[_Child]:
    specs = process_specs(
        task,
        allocation,
        env=_own_environment(os.environ),
        working_dir=os.getcwd(),
        rendezvous_file=str(rendezvous),
        node=node,
    )
    Path(task.log_path).parent.mkdir(parents=True, exist_ok=True)
    dies_with = DiesWithParent()
    with open(task.log_path, "ab") as log, _on_cores(allocation.cores):
        return [
            _Child(
                rank,
                subprocess.Popen(
                    interpreter_command(spec),
                    env={**spec.env, "PYTHONUNBUFFERED": "1"},
                    cwd=spec.working_dir,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    preexec_fn=dies_with,
                ),
            )
            for rank, spec in enumerate(specs)
        ]


@contextlib.contextmanager
def _on_cores(cores: Sequence[int]) -> Iterator[None]:
    """Processes started inside the block run on ``cores``; this one may use all of its own again after it."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def _own_environment(env: Mapping[str, str]) -> dict[str, str]:
    # What Slurm tells its tasks about ranks is about this process, not about the group's.
    return {name: value for name, value in env.items() if not name.startswith(("SLURM_", "SRUN_", "PMI"))}


def _wait(children: list[_Child], stop: StopRequest, stop_s: float, has_failed_elsewhere: Callable[[], bool]) -> bool:
    """Wait for the end of all; returns whether that was because of a failure elsewhere."""
    kill_time: float | None = None
    num_ended, next_look = 0, 0.0
    is_ended = False
    while running := [child for child in children if child.exit_code is None]:
        for child in running:
            child.exit_code = child.process.poll()
            if child.exit_code is not None:
                num_ended += 1
                child.order = num_ended
        failed = any(child.exit_code for child in children)
        if kill_time is None and not failed and stop.time is None and time.monotonic() > next_look:
            is_ended = has_failed_elsewhere()
            next_look = time.monotonic() + _ELSEWHERE_INTERVAL_S
        if kill_time is None and (failed or is_ended or stop.time is not None):
            _signal(children, signal.SIGTERM)
            kill_time = time.monotonic() + (_FAILURE_GRACE_S if stop.time is None else stop_s)
        if kill_time is not None and time.monotonic() > kill_time:
            _signal(children, signal.SIGKILL)
        time.sleep(_POLL_INTERVAL_S)
    return is_ended and any(child.exit_code for child in children)


def _status(task: Task, node: Node, children: list[_Child], stop: StopRequest) -> Status:
    failed = sorted((child for child in children if child.exit_code), key=lambda child: child.order)
    if not failed:
        return Status(name=task.name, state=State.succeeded, exit_code=0)
    if stop.time is not None:
        return Status(name=task.name, state=State.cancelled, exit_code=failed[0].exit_code, reason="stopped by Slurm")
    first = failed[0]
    which = node.process_name(first.rank, len(children))
    reason = f"{which} {describe_exit(first.exit_code or 0)}"
    return Status(name=task.name, state=State.failed, exit_code=first.exit_code, reason=reason)


def _signal(children: list[_Child], number: int) -> None:
    for child in children:
        if child.exit_code is None:
            with contextlib.suppress(ProcessLookupError):
                child.process.send_signal(number)
