"""What is run, where it may run, and how it went."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Protocol


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """A Python module to run as one group of processes.

    Every process gets ``RANK``, ``LOCAL_RANK``, ``WORLD_SIZE`` and ``RENDEZVOUS_FILE`` (a fresh path for
    ``torch.distributed``'s file store; no ports), or where there are several nodes ``MASTER_ADDR`` and ``MASTER_PORT``;
    the task succeeds when all processes exit with 0, and when one fails or a node is lost the others are ended.
    """

    name: str
    """Unique among the tasks of an executor."""
    module: str
    """Run as ``python -m module *arguments``."""
    arguments: Sequence[str] = ()
    env: Mapping[str, str] = field(default_factory=dict)
    """Added to the environment of this process. Never put secrets here."""
    log_path: Path
    """Receives stdout and stderr of all processes, appended."""
    num_processes: int = 1
    num_cpus: int = 1
    """Cores of the whole group, shared by its processes."""
    num_gpus: int = 0
    num_nodes: int = 1
    """Nodes among which processes, cores and GPUs are divided equally."""


class State(StrEnum):
    """Life of a task."""

    queued = "queued"
    running = "running"
    succeeded = "succeeded"
    failed = "failed"
    cancelled = "cancelled"


@dataclass(frozen=True, kw_only=True, slots=True)
class Status:
    """Where a task stands."""

    name: str
    state: State
    exit_code: int | None = None
    """Of the first process that failed; negative is the signal that ended it."""
    reason: str = ""
    """Why it failed, for people."""

    @property
    def is_final(self) -> bool:
        """Whether the state will not change any more."""
        return self.state in (State.succeeded, State.failed, State.cancelled)


class Executor(Protocol):
    """Starts tasks as resources allow; more tasks than groups queue in the order of submission."""

    def submit(self, task: Task) -> None:
        """Queue ``task``. A name whose earlier task has ended may be used again (a restart)."""
        ...

    def poll(self) -> dict[str, Status]:
        """Status of every task submitted so far, by name; starts queued tasks that now fit. Never blocks for long."""
        ...

    def cancel(self, name: str, *, grace_s: float = 10.0) -> None:
        """End a task: TERM to its processes, KILL after ``grace_s``; returns at once."""
        ...

    def close(self) -> None:
        """End everything that this executor started, and nothing else. Idempotent."""
        ...
