"""Tasks on this machine: forked processes, disjoint cores, no network."""

import os
import secrets
import time
from collections.abc import Sequence
from typing import Self

from launch.fork_client import ForkServer
from launch.group import Group
from launch.resources import CoreLeases, ResourcePool, available_cores, available_gpus
from launch.task import State, Status, Task
from launch.task_queue import TaskQueue, check_num_groups

_POLL_INTERVAL_S = 0.02


class LocalExecutor:
    """Runs tasks on this machine, each on cores and GPUs of its own; implements :class:`launch.task.Executor`.

    The queue is plain first in, first out: a task that does not fit yet holds back those behind it, so none starves.
    Processes start as forks of one server that has imported ``preload`` (a task whose environment holds variables that
    are read at interpreter start gets a fresh interpreter). Everything that was started dies with this process, also
    when it is killed; the processes are in sessions of their own, so Ctrl-C reaches this process alone. No port is
    opened. Use it from one thread.

    Args:
        num_groups: Most tasks at the same time; None is as many as cores and GPUs allow.
        preload: Modules imported once for all tasks.
        cores: Core ids to use; None takes those that this process may use.
        gpus: GPU ids to use; None takes those that this process sees.
        grace_s: Seconds between TERM and KILL when a process of a group has failed, and in :meth:`close`.
    """

    def __init__(
        self,
        num_groups: int | None = None,
        *,
        preload: Sequence[str] = (),
        cores: Sequence[int] | None = None,
        gpus: Sequence[str] | None = None,
        grace_s: float = 10.0,
    ) -> None:
        self._pool = ResourcePool(
            available_cores() if cores is None else cores,
            available_gpus() if gpus is None else gpus,
            num_groups=check_num_groups(num_groups),
            leases=CoreLeases(secrets.token_hex(4)),
        )
        self._preload = tuple(preload)
        self._grace_s = grace_s
        self._server = ForkServer(self._preload)
        self._queue = TaskQueue()
        self._groups: dict[str, Group] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def submit(self, task: Task) -> None:
        """Queue ``task``; it starts at once when it fits and nothing waits before it.

        Raises:
            ValueError: If the task is malformed, can never fit on this machine, or its name is that of a task that
                has not ended.
            RuntimeError: If the executor is closed.
        """
        problem = self._pool.problem(task.num_cpus, task.num_gpus)
        if task.num_nodes > 1:
            problem = (
                f"runs on {task.num_nodes} nodes, this is one machine; take Ray on a cluster, or Slurm (num_nodes)"
            )
        self._queue.add(task, problem=problem)
        self._start_what_fits()

    def poll(self) -> dict[str, Status]:
        """Status of every task submitted so far, by name; starts queued tasks that now fit. Does not block."""
        self._server.poll()
        for name, group in list(self._groups.items()):
            self._queue.statuses[name] = group.update()
            if self._queue.statuses[name].is_final:
                self._pool.release(self._groups.pop(name).allocation)
        if not self._queue.is_closed:
            self._start_what_fits()
        return dict(self._queue.statuses)

    def cancel(self, name: str, *, grace_s: float = 10.0) -> None:
        """End a task: TERM to its processes, KILL after ``grace_s``; returns at once. No effect on one that ended.

        Raises:
            ValueError: If no task of this name was submitted.
        """
        if self._queue.is_over(name):
            return
        if name in self._groups:
            self._groups[name].cancel(grace_s)
        else:
            self._queue.withdraw(name)

    def close(self) -> None:
        """Cancel what waits, end what runs (TERM, KILL after ``grace_s``) and the fork server. Idempotent."""
        if self._queue.is_closed:
            return
        self._queue.is_closed = True
        try:
            for name in [*(task.name for task in self._queue.waiting), *self._groups]:
                self.cancel(name, grace_s=self._grace_s)
            while self._groups:
                self.poll()
                time.sleep(_POLL_INTERVAL_S)
        finally:
            # A second Ctrl-C while waiting ends here: KILL for the rest.
            self._server.close()
            self.poll()

    def _start_what_fits(self) -> None:
        while self._queue.waiting:
            task = self._queue.waiting[0]
            allocation = self._pool.acquire(task.num_cpus, task.num_gpus)
            if allocation is None:
                return
            self._queue.waiting.popleft()
            self._groups[task.name] = Group(
                task,
                allocation,
                self._living_server(),
                env=os.environ,
                grace_s=self._grace_s,
            )
            self._queue.set(task.name, State.running)

    def _living_server(self) -> ForkServer:
        if not self._server.is_alive:
            # It was killed, and its children with it. If a preloaded module did that, go on without.
            self._server.close()
            self._server = ForkServer(self._preload if self._server.is_ready else ())
        return self._server
