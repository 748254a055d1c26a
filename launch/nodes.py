"""A task on several nodes: what each of them runs, where the processes meet, and what becomes of the task.

One agent per node (a Ray actor, a task of a Slurm step) starts the node's share of the processes. They meet at an
address of the first node, ``MASTER_ADDR`` and ``MASTER_PORT``, which is chosen anew for every attempt: a lost node ends
the attempt on all the others, and the next one may run on other nodes.
"""

import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from launch.task import State, Status, Task


@dataclass(frozen=True, kw_only=True, slots=True)
class Node:
    """Which of a task's nodes this one is."""

    rank: int = 0
    count: int = 1
    address: str = ""
    """``host:port`` on the first node, where the processes of several nodes meet."""

    def process_name(self, index: int, num_processes: int) -> str:
        """What to call process ``index`` of the ``num_processes`` of this node in a message."""
        if self.count == 1:
            return f"process {index} of {num_processes}" if num_processes > 1 else "it"
        rank, size = self.rank * num_processes + index, self.count * num_processes
        return f"process {rank} of {size}, on node {self.rank} of {self.count},"


def node_share(task: Task, rank: int) -> Task:
    """What node ``rank`` of a task runs: equally many processes, cores and GPUs as each other, and a log of its own.

    Appends of several nodes to one file of a network file system would overwrite each other.
    """
    count = task.num_nodes
    return replace(
        task,
        num_nodes=1,
        num_processes=task.num_processes // count,
        num_cpus=task.num_cpus // count,
        num_gpus=task.num_gpus // count,
        log_path=log_of_node(Path(task.log_path), rank),
    )


def log_of_node(path: Path, rank: int) -> Path:
    """Log of a node: the task's own for the first, ``log.node1.txt`` beside ``log.txt`` for another."""
    return path.with_name(f"{path.stem}.node{rank}{path.suffix}") if rank else path


def free_port() -> int:
    """A port of this machine that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


def ended_with_others(name: str) -> Status:
    """Status of a node whose processes were ended because those of another one failed."""
    return Status(name=name, state=State.failed, exit_code=os.EX_TEMPFAIL, reason="ended because another node failed")


def combined(statuses: Sequence[Status]) -> Status:
    """What becomes of a task whose nodes ended like this.

    It was stopped when any of them was, and failed when any of them did. A process that has lost the others exits with
    75 (``EX_TEMPFAIL``); that is the consequence of a failure, so another one is named if there is any.
    """
    failed = [status for status in statuses if status.state is State.failed]
    stopped = [status for status in statuses if status.state is State.cancelled]
    causes = [status for status in failed if status.exit_code != os.EX_TEMPFAIL]
    return (stopped or causes or failed or list(statuses))[0]
