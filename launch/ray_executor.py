"""Tasks on Ray: one placement group and one supervising actor per task.

Plain actors, not Ray Train: a task is a command that talks to nobody, and an actor starts in half a second. The only
file of this package that imports Ray, and only inside functions.
"""

import contextlib
import importlib
import logging
import os
import secrets
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from launch.process import added_import_path
from launch.ray_session import PrivateSession, end_processes, termination_handler_kept, unreachable
from launch.resources import available_cores, available_gpus, nodes_problem
from launch.supervisor import Supervisor, absolute
from launch.task import State, Status, Task
from launch.task_queue import TaskQueue, check_num_groups

_POLL_INTERVAL_S = 0.05
_CLOSE_MARGIN_S = 10.0
_OBJECT_STORE_BYTES = 100 << 20


@dataclass(slots=True, eq=False)
class _Running:
    """A task that has asked for a placement group, and the actor inside."""

    task: Task
    placement: Any
    placed: Any
    actor: Any
    started: Any
    ended: Any
    is_cancelled: bool = False


class RayExecutor:
    """Runs tasks on a Ray cluster; implements :class:`launch.task.Executor`.

    First in, first out: the next placement group is requested when Ray has granted the one before, and a group whose
    task has succeeded goes, with its warm actor, to the next task of the same size. Logs must be on a file system that
    all nodes share. Make and use it in the main thread: the kernel ends a private Ray with the thread that started it.
    A connection to Ray that this process has already is used and left open.

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
        self.session: PrivateSession | None = None
        self._owns_connection = not ray.is_initialized()
        if not self._owns_connection:
            return
        if address is None:
            self.session = PrivateSession(session_parent)
            self._start_ray(num_cpus=len(available_cores()) if num_cpus is None else num_cpus, dashboard=dashboard)
        else:
            _check_access(address)
            with termination_handler_kept():
                ray.init(address, log_to_driver=False, logging_level=logging.ERROR)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def submit(self, task: Task) -> None:
        """Queue ``task``.

        Raises:
            ValueError: If the task is malformed, no node could hold it, or its name is that of a task that has not
                ended.
            RuntimeError: If the executor is closed.
        """
        import ray

        nodes = [] if self._queue.is_closed else [node["Resources"] for node in ray.nodes() if node["Alive"]]
        self._queue.add(absolute(task), problem=nodes_problem(nodes, task.num_cpus, task.num_gpus))
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
        if running and _is_done(running.started):
            running.is_cancelled = True
            running.actor.cancel.remote(grace_s)
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
                self._stop_ray()

    def _start_ray(self, *, num_cpus: int, dashboard: bool) -> None:
        import ray

        assert self.session is not None
        self.session.enter_environment()
        try:
            _forget_token()
            with termination_handler_kept():
                ray.init(
                    "local",
                    num_cpus=num_cpus,
                    num_gpus=len(available_gpus()),
                    include_dashboard=dashboard,
                    dashboard_host="127.0.0.1",
                    object_store_memory=_OBJECT_STORE_BYTES,
                    log_to_driver=False,
                    logging_level=logging.ERROR,
                    _temp_dir=str(self.session.ray_dir),
                )
        except BaseException:
            self._stop_ray()
            raise

    def _stop_ray(self) -> None:
        import ray

        processes = self.session.processes() if self.session else []
        ray.shutdown(wait_for_processes=True)
        if self.session:
            end_processes(processes)
            self.session.leave_environment()
            # The token file goes last: threads of the connection that drain may still read it.
            _forget_token()
            self.session.remove()

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

        bundle = {"CPU": float(task.num_cpus)} | ({"GPU": float(task.num_gpus)} if task.num_gpus else {})
        placement = placement_group([bundle])
        remote_class: Any = ray.remote(Supervisor)
        actor = remote_class.options(
            num_cpus=task.num_cpus,
            num_gpus=task.num_gpus,
            max_restarts=0,
            scheduling_strategy=PlacementGroupSchedulingStrategy(placement, placement_group_bundle_index=0),
        ).remote(os.getcwd(), import_path=added_import_path(sys.path), **self._options)
        return self._run(task, placement, placement.ready(), actor)

    def _run(self, task: Task, placement: Any, placed: Any, actor: Any) -> _Running:
        started = actor.start.remote(task)
        return _Running(task, placement, placed, actor, started, actor.wait.remote(started))

    def _hand_on(self, free: _Running, status: Status) -> None:
        # Ray looks at a waiting placement group about once a second, and a new actor takes half of one.
        is_usable = status.state is State.succeeded and not self._queue.is_closed
        successor = self._next_task() if is_usable else None
        if successor is None or (successor.num_cpus, successor.num_gpus) != (free.task.num_cpus, free.task.num_gpus):
            self._release(free)
            return
        if successor.name in self._running:
            self._release(self._running.pop(successor.name))
        else:
            self._queue.waiting.popleft()
        self._running[successor.name] = self._run(successor, free.placement, free.placed, free.actor)

    def _next_task(self) -> Task | None:
        unplaced = next((running.task for running in self._running.values() if not _is_done(running.placed)), None)
        return unplaced or (self._queue.waiting[0] if self._queue.waiting else None)

    def _look_at(self, name: str, running: _Running) -> Status:
        import ray
        from ray.exceptions import RayError, RayTaskError

        if not _is_done(running.ended):
            return Status(name=name, state=State.running if _is_done(running.started) else State.queued)
        try:
            return ray.get(running.ended)
        except RayError as error:
            if running.is_cancelled:
                return Status(name=name, state=State.cancelled, reason="cancelled; its actor died")
            lines = [line for line in str(error).strip().splitlines() if not line.startswith("\t")]
            line = " ".join(lines[-1:] if isinstance(error, RayTaskError) else lines[:2])
            return Status(name=name, state=State.failed, reason=f"the Ray actor that ran it failed: {line}")

    def _release(self, running: _Running | None) -> None:
        import ray
        from ray.exceptions import RayError
        from ray.util.placement_group import remove_placement_group

        if running:
            with contextlib.suppress(RayError):
                ray.kill(running.actor)
            with contextlib.suppress(RayError):
                remove_placement_group(running.placement)


def _is_done(reference: Any) -> bool:
    import ray

    return bool(ray.wait([reference], timeout=0)[0])


def _check_access(address: str) -> None:
    # Ray itself tries a dead address for a minute, and a wrong token for 20 seconds before it says something else.
    from ray.exceptions import AuthenticationError

    problem = unreachable(address)
    if problem:
        raise ConnectionError(problem)
    with contextlib.suppress(ImportError, AttributeError):
        raylet: Any = importlib.import_module("ray._raylet")
        try:
            raylet.GcsClient(address=address)
        except AuthenticationError:
            remedy = "set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH to the path of its token file"
            raise ConnectionError(f"the Ray cluster at {address} refuses this session's token; {remedy}") from None


def _forget_token() -> None:
    # Ray keeps the token of a process's first connection. Not public: without it, one session per process works.
    with contextlib.suppress(ImportError, AttributeError):
        raylet: Any = importlib.import_module("ray._raylet")
        raylet.Config.initialize("")
        raylet.AuthenticationTokenLoader.instance().reset_cache()
