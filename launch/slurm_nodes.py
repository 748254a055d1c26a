"""A task on several nodes of a Slurm job: one agent per node, all of them tasks of one job step.

The first one leads: it says what to run and where the processes meet; the others follow, attempt by attempt, and say
how their share ended. They speak through small files of the shared file system, in a directory of their step.
"""

import itertools
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from launch import slurm_commands
from launch.nodes import Node, combined, free_port
from launch.slurm_files import read_json, write_json
from launch.slurm_group import StopRequest, run_group
from launch.slurm_options import task_of, task_values
from launch.task import State, Status, Task

_POLL_INTERVAL_S = 0.2
_SILENCE_S = 60.0
"""Seconds that the others may take to say how they ended, after a failure; file systems pass news on slowly."""
_LEAVING_S = 10.0


@dataclass(frozen=True, slots=True)
class StepNode:
    """Place of this process in its job step."""

    rank: int
    count: int
    name: str
    """Of the step, the same on all its nodes and never used again."""


def own_node(env: Mapping[str, str]) -> StepNode:
    """Where this process is, as Slurm says; alone, when it is no task of a step."""
    if "SLURM_STEP_ID" not in env:
        return StepNode(0, 1, "")
    name = ".".join([env["SLURM_JOB_ID"], env["SLURM_STEP_ID"], env.get("SLURM_RESTART_COUNT", "0")])
    return StepNode(int(env.get("SLURM_NODEID", "0")), int(env.get("SLURM_STEP_NUM_NODES", "1")), name)


def node_address() -> str:
    """Address of this node, by which the others of its cluster reach it."""
    name = os.environ.get("SLURMD_NODENAME", "")
    return (slurm_commands.node_address(name) if name else None) or os.uname().nodename


class Leader:
    """The agent of the first node; :func:`leading` makes it.

    Args:
        directory: Of the step's messages.
        count: Nodes of the step.
    """

    def __init__(self, directory: Path, count: int) -> None:
        self._directory = directory
        self._count = count
        self._attempt = 0

    def run(self, task: Task, stop: StopRequest, *, stop_s: float) -> Status:
        """Run ``task`` on its nodes to its end; see :func:`launch.slurm_group.run_group`.

        Raises:
            ValueError: If it is for another number of nodes than there are.
        """
        if task.num_nodes == 1:
            return run_group(task, stop, stop_s=stop_s)
        if task.num_nodes != self._count:
            raise ValueError(
                f"task {task.name!r} runs on {task.num_nodes} nodes, this job step has {self._count}; "
                f"submit it with sbatch --nodes={task.num_nodes}"
            )
        self._attempt += 1
        node = Node(rank=0, count=self._count, address=f"{node_address()}:{free_port()}")
        request = {"task": task_values(task), "address": node.address, "stop_s": stop_s}
        write_json(_request(self._directory, self._attempt), request)
        own = run_group(task, stop, stop_s=stop_s, node=node, has_failed_elsewhere=self._have_others_failed)
        write_json(_word(self._directory, self._attempt, 0), _values(own))
        return combined([own, *self._wait_for_others(task.name, is_well=own.state is State.succeeded)])

    def close(self) -> None:
        """Send the others home, and let them leave first.

        A task that fails has Slurm kill those that are still there, whose exit code would hide the one that counts.
        """
        write_json(_over(self._directory, 0), {"over": True})
        deadline = time.monotonic() + _LEAVING_S
        waiting = [_over(self._directory, rank) for rank in range(1, self._count)]
        while not all(map(read_json, waiting)) and time.monotonic() < deadline:
            time.sleep(_POLL_INTERVAL_S)

    def _others(self) -> list[Status | None]:
        return [_read(_word(self._directory, self._attempt, rank)) for rank in range(1, self._count)]

    def _have_others_failed(self) -> bool:
        return any(status and status.state is not State.succeeded for status in self._others())

    def _wait_for_others(self, name: str, *, is_well: bool) -> list[Status]:
        # Where all went well there is no limit: the agent of a node that is lost ends with the whole step.
        deadline = time.monotonic() + (float("inf") if is_well else _SILENCE_S)
        while None in (found := self._others()) and time.monotonic() < deadline:
            time.sleep(_POLL_INTERVAL_S)
        silent = "node {} did not say how its processes ended; it may be lost"
        return [
            status or Status(name=name, state=State.failed, reason=silent.format(rank))
            for rank, status in enumerate(found, start=1)
        ]


@contextmanager
def leading(parent: Path, place: StepNode) -> Iterator[Leader]:
    """Lead the nodes of this job step, if there are others.

    Args:
        parent: Directory on the shared file system, under which each step makes one of its own.
        place: Of this process, which must be the first.
    """
    leader = Leader(parent / place.name, place.count)
    try:
        yield leader
    finally:
        if place.count > 1:
            leader.close()


def follow(parent: Path, place: StepNode, stop: StopRequest) -> None:
    """Run this node's share of whatever the first node begins, until that one has ended."""
    directory = parent / place.name
    for attempt in itertools.count(1):
        while not (request := read_json(_request(directory, attempt))):
            if read_json(_over(directory, 0)):
                write_json(_over(directory, place.rank), {"over": True})
                return
            time.sleep(_POLL_INTERVAL_S)
        leader = _word(directory, attempt, 0)
        status = run_group(
            task_of(request),
            stop,
            stop_s=float(request["stop_s"]),
            node=Node(rank=place.rank, count=place.count, address=request["address"]),
            has_failed_elsewhere=lambda leader=leader: (_read(leader) or _WELL).state is not State.succeeded,
        )
        write_json(_word(directory, attempt, place.rank), _values(status))


_WELL = Status(name="", state=State.succeeded)


def _over(directory: Path, rank: int) -> Path:
    return directory / f"over-{rank}.json"


def _request(directory: Path, attempt: int) -> Path:
    return directory / f"attempt-{attempt}.json"


def _word(directory: Path, attempt: int, rank: int) -> Path:
    return directory / f"attempt-{attempt}-node-{rank}.json"


def _values(status: Status) -> dict[str, object]:
    return {"name": status.name, "state": status.state, "exit_code": status.exit_code, "reason": status.reason}


def _read(path: Path) -> Status | None:
    if not (values := read_json(path)):
        return None
    state = State(values["state"])
    return Status(name=values["name"], state=state, exit_code=values["exit_code"], reason=values["reason"])
