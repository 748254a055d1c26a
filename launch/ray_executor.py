"""Tasks on Ray: one placement group per task, and one supervising actor on each of its nodes.

Plain actors, not Ray Train: a task is a command that talks to nobody, and an actor starts in half a second. This file
and ``launch/ray_connection.py`` alone import Ray, and only inside functions.
"""

import contextlib
import os
import secrets
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from launch.nodes import combined, node_share
from launch.process import added_import_path
from launch.ray_connection import connect, disconnect, start_private
from launch.ray_session import PrivateSession
from launch.resources import available_cores, nodes_problem
from launch.supervisor import Supervisor, absolute
from launch.task import State, Status, Task
from launch.task_queue import TaskQueue, check_num_groups

_POLL_INTERVAL_S = 0.05
_CLOSE_MARGIN_S = 10.0


@dataclass(slots=True, eq=False)
class _Running:
    """A task that has asked for a placement group, and the actors inside, one per node."""

    task: Task
    placement: Any
    placed: Any
    actors: list[Any]
    started: list[Any]
    ended: list[Any]
    is_cancelled: bool = False
    is_ending: bool = False
    """The rest was told that one of the nodes has failed."""


class RayExecutor:
    """Runs tasks on a Ray cluster; implements :class:`launch.task.Executor`.

    First in, first out: the next placement group is requested when Ray has granted the one before, and a group whose
    task has succeeded goes, with its warm actor, to the next task of the same size. Logs must be on a file system that
    all nodes share. Make and use it in the main thread: the kernel ends a private Ray with the thread that started it.
    A connection to Ray that this process has already is used and left open. A task that runs on several nodes gets as
    many different ones; when one is lost the task fails as a whole, and its restart waits until enough nodes are there.

    Args:
        address: Of an existing cluster (its token is taken from the environment, as Ray does); None starts a private
            one on this machine: token required, no dashboard, files in a directory of mode 0700.
        num_groups: Most tasks at the same time; None is as many as the cluster holds.
        dashboard: Serve the dashboard of a private Ray on the loopback address.
        num_cpus: Cores of a private Ray; None takes those that this process may use.
        preload: Modules that each supervisor imports once for the processes of its task.
        session_parent: Short path under which the private directory is made; None is the temporary directory.
        grace_s: Seconds between TERM and KILL when a process of a group has failed, and in :meth:`close`.

    Raises:
        ConnectionError: If nothing answers at ``address``, or it refuses the token.
        ValueError: If ``num_groups`` is less than 1, or no directory is short enough for Ray's sockets.
    """

    def __init__(
        self,
        address: str | None = None,
        *,
        num_groups: int | None = None,
        dashboard: bool = False,
        num_cpus: int | None = None,
        preload: Sequence[str] = (),
        session_parent: Path | None = None,
        grace_s: float = 10.0,
    ) -> None:
        import ray

        self._num_groups = check_num_groups(num_groups)
        self._grace_s = grace_s
        self._options = {"lease_group": secrets.token_hex(4), "preload": tuple(preload), "grace_s": grace_s}
        self._queue = TaskQueue()
        self._running: dict[str, _Running] = {}
        self._seen_nodes: dict[str, dict[str, float]] = {}
        self.session: PrivateSession | None = None
        self._owns_connection = not ray.is_initialized()
        if not self._owns_connection:
            return
        if address is None:
            self.session = PrivateSession(session_parent)
            num_cpus = len(available_cores()) if num_cpus is None else num_cpus
            start_private(self.session, num_cpus=num_cpus, dashboard=dashboard)
        else:
            connect(address)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def submit(self, task: Task) -> None:
        """Queue ``task``.

        Raises:
            ValueError: If the task is malformed, the nodes that were ever there could not hold it, or its name is that
                of a task that has not ended.
            RuntimeError: If the executor is closed.
        """
        import ray

        nodes = [] if self._queue.is_closed else [node for node in ray.nodes() if node["Alive"]]
        self._seen_nodes |= {node["NodeID"]: node["Resources"] for node in nodes}
        count = max(1, task.num_nodes)
        seen = list(self._seen_nodes.values())
        problem = nodes_problem(seen, task.num_cpus // count, task.num_gpus // count, count)
        self._queue.add(absolute(task), problem=problem)
        self._start_what_fits()

    def poll(self) -> dict[str, Status]:
        """Status of every task submitted so far, by name; starts queued tasks that now fit. Never blocks for long."""
        for name, running in list(self._running.items()):
            if self._running.get(name) is not running:
                continue  # it was given another's place in this very loop
            self._queue.statuses[name] = self._look_at(name, running)
            if self._queue.statuses[name].is_final:
                self._hand_on(self._running.pop(name), self._queue.statuses[name])
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
        running = self._running.get(name)
        if running and _are_done(running.started):
            running.is_cancelled = True
            for actor in running.actors:
                actor.cancel.remote(grace_s)
        else:
            self._queue.withdraw(name)
            self._release(self._running.pop(name, None))

    def close(self) -> None:
        """Cancel what waits, end what runs, and end a private Ray; a cluster of others is only left. Idempotent."""
        if self._queue.is_closed:
            return
        self._queue.is_closed = True
        try:
            for name in [*(task.name for task in self._queue.waiting), *self._running]:
                self.cancel(name, grace_s=self._grace_s)
            deadline = time.monotonic() + self._grace_s + _CLOSE_MARGIN_S
            while self._running and time.monotonic() < deadline:
                self.poll()
                time.sleep(_POLL_INTERVAL_S)
        finally:
            for name in list(self._running):
                self._release(self._running.pop(name))
                self._queue.set(name, State.cancelled, "ended with the executor")
            if self._owns_connection:
                disconnect(self.session)

    def _start_what_fits(self) -> None:
        import ray

        while self._queue.waiting and (self._num_groups is None or len(self._running) < self._num_groups):
            waiting = [running.placed for running in self._running.values()]
            if waiting and len(ray.wait(waiting, num_returns=len(waiting), timeout=_POLL_INTERVAL_S)[1]) > 0:
                return
            task = self._queue.waiting.popleft()
            self._running[task.name] = self._place(task)

    def _place(self, task: Task) -> _Running:
        import ray
        from ray.util.placement_group import placement_group
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        share = node_share(task, 0)
        bundle = {"CPU": float(share.num_cpus)} | ({"GPU": float(share.num_gpus)} if share.num_gpus else {})
        strategy = "STRICT_SPREAD" if task.num_nodes > 1 else "PACK"
        placement = placement_group([bundle] * task.num_nodes, strategy=strategy)
        remote_class: Any = ray.remote(Supervisor)
        actors = [
            remote_class.options(
                num_cpus=share.num_cpus,
                num_gpus=share.num_gpus,
                max_restarts=0,
                scheduling_strategy=PlacementGroupSchedulingStrategy(placement, placement_group_bundle_index=index),
            ).remote(os.getcwd(), import_path=added_import_path(sys.path), **self._options)
            for index in range(task.num_nodes)
        ]
        return self._run(task, placement, placement.ready(), actors)

    def _run(self, task: Task, placement: Any, placed: Any, actors: list[Any]) -> _Running:
        # Ray hands the others the address when the first has found it.
        address = actors[0].meet.remote(_address_of_node) if actors[1:] else ""
        started = [actor.start.remote(task, rank, address) for rank, actor in enumerate(actors)]
        ended = [actor.wait.remote(one) for actor, one in zip(actors, started, strict=True)]
        return _Running(task, placement, placed, actors, started, ended)

    def _hand_on(self, free: _Running, status: Status) -> None:
        # Ray looks at a waiting placement group about once a second, and a new actor takes half of one.
        is_usable = status.state is State.succeeded and not self._queue.is_closed
        successor = self._next_task() if is_usable else None
        if successor is None or _size(successor) != _size(free.task):
            self._release(free)
            return
        if successor.name in self._running:
            self._release(self._running.pop(successor.name))
        else:
            self._queue.waiting.popleft()
        self._running[successor.name] = self._run(successor, free.placement, free.placed, free.actors)

    def _next_task(self) -> Task | None:
        unplaced = next((running.task for running in self._running.values() if not _is_done(running.placed)), None)
        return unplaced or (self._queue.waiting[0] if self._queue.waiting else None)

    def _look_at(self, name: str, running: _Running) -> Status:
        statuses = {index: self._end_of(name, running, index) for index in _done(running.ended)}
        if len(statuses) == len(running.ended):
            return combined(list(statuses.values()))
        if not running.is_ending and any(status.state is not State.succeeded for status in statuses.values()):
            running.is_ending = True
            for index, actor in enumerate(running.actors):
                if index not in statuses:
                    actor.end_with_others.remote()
        return Status(name=name, state=State.running if _are_done(running.started) else State.queued)

    def _end_of(self, name: str, running: _Running, index: int) -> Status:
        """How the share of one node ended."""
        import ray
        from ray.exceptions import RayError, RayTaskError

        try:
            return ray.get(running.ended[index])
        except RayError as error:
            if running.is_cancelled:
                return Status(name=name, state=State.cancelled, reason="cancelled; its actor died")
            lines = [line for line in str(error).strip().splitlines() if not line.startswith("\t")]
            line = " ".join(lines[-1:] if isinstance(error, RayTaskError) else lines[:2])
            where = f" (node {index} of {len(running.actors)})" if running.actors[1:] else ""
            return Status(name=name, state=State.failed, reason=f"the Ray actor that ran it{where} failed: {line}")

    def _release(self, running: _Running | None) -> None:
        import ray
        from ray.exceptions import RayError
        from ray.util.placement_group import remove_placement_group

        if running:
            for actor in running.actors:
                with contextlib.suppress(RayError):
                    ray.kill(actor)
            with contextlib.suppress(RayError):
                remove_placement_group(running.placement)


def _is_done(reference: Any) -> bool:
    return _are_done([reference])


def _are_done(references: list[Any]) -> bool:
    return len(_done(references)) == len(references)


def _done(references: list[Any]) -> list[int]:
    """Indices of the results that are there."""
    import ray

    ready = set(ray.wait(references, num_returns=len(references), timeout=0)[0])
    return [index for index, reference in enumerate(references) if reference in ready]


def _size(task: Task) -> tuple[int, int, int]:
    return task.num_cpus, task.num_gpus, task.num_nodes


def _address_of_node() -> str:
    import ray

    return ray.util.get_node_ip_address()
