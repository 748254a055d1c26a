"""The processes of one task, as one thing that succeeds, fails or is cancelled."""

import contextlib
import os
import secrets
import signal
import time
from collections.abc import Mapping

from launch.fork_client import ForkServer, Process
from launch.nodes import Node, ended_with_others
from launch.process import process_specs
from launch.resources import Allocation, private_dir
from launch.task import State, Status, Task


class Group:
    """A running task.

    The first process that fails decides: the others get TERM and, when ``grace_s`` has passed, KILL.

    Args:
        task: What to run; of a task on several nodes the share of this one.
        allocation: Cores and GPUs of the group.
        server: Starts the processes.
        env: Environment that the task's variables are added to.
        grace_s: Seconds between TERM and KILL after a failure.
        node: Which of several nodes this one is.
    """

    def __init__(
        self,
        task: Task,
        allocation: Allocation,
        server: ForkServer,
        *,
        env: Mapping[str, str],
        grace_s: float = 10.0,
        node: Node | None = None,
    ) -> None:
        self.allocation = allocation
        self._node = node or Node()
        self._name = task.name
        self._server = server
        self._grace_s = grace_s
        self._is_cancelled = False
        self._is_ended = False
        self._kill_time: float | None = None
        self._is_killed = False
        self._rendezvous = private_dir() / f"rendezvous-{secrets.token_hex(8)}"
        specs = process_specs(
            task,
            allocation,
            env=env,
            working_dir=os.getcwd(),
            rendezvous_file=str(self._rendezvous),
            node=self._node,
        )
        self.processes: list[Process] = [server.start(spec) for spec in specs]

    def update(self) -> Status:
        """Act on what has happened to the processes since the last call (``server.poll`` first)."""
        failed = [process for process in self.processes if process.exit_code]
        running = [process for process in self.processes if process.exit_code is None]
        if failed and running and self._kill_time is None:
            self._end(self._grace_s)
        if running:
            self._kill_if_due()
            return Status(name=self._name, state=State.running)
        with contextlib.suppress(OSError):
            self._rendezvous.unlink()
        if self._is_cancelled:
            return Status(name=self._name, state=State.cancelled, reason="cancelled")
        if failed and self._is_ended:
            return ended_with_others(self._name)
        if failed:
            first = min(failed, key=lambda process: process.order)
            return Status(name=self._name, state=State.failed, exit_code=first.exit_code, reason=self._reason_of(first))
        return Status(name=self._name, state=State.succeeded, exit_code=0)

    def cancel(self, grace_s: float) -> None:
        """TERM to all processes, KILL after ``grace_s`` seconds; an earlier, sooner end stays in force."""
        self._is_cancelled = True
        self._end(grace_s)

    def end_with_others(self) -> None:
        """Another node of the task has failed: the same as for a failure here, with a status that says so."""
        if not any(process.exit_code for process in self.processes):
            self._is_ended = True
        self._end(self._grace_s)

    def _end(self, grace_s: float) -> None:
        kill_time = time.monotonic() + grace_s
        if self._kill_time is None:
            for process in self.processes:
                self._server.signal(process, signal.SIGTERM)
        self._kill_time = kill_time if self._kill_time is None else min(self._kill_time, kill_time)

    def _kill_if_due(self) -> None:
        if self._kill_time is not None and not self._is_killed and time.monotonic() >= self._kill_time:
            self._is_killed = True
            for process in self.processes:
                self._server.signal(process, signal.SIGKILL)

    def _reason_of(self, process: Process) -> str:
        if process.error:
            return process.error
        which = self._node.process_name(self.processes.index(process), len(self.processes))
        return f"{which} {describe_exit(process.exit_code or 0)}"


def describe_exit(exit_code: int) -> str:
    """Say in words how a process ended: ``exited with code 1``, ``was ended by signal SIGKILL (9)``."""
    if exit_code >= 0:
        return f"exited with code {exit_code}"
    try:
        name = signal.Signals(-exit_code).name
    except ValueError:
        name = "number"
    hint = "; the kernel does this when memory runs out" if exit_code == -signal.SIGKILL else ""
    return f"was ended by signal {name} ({-exit_code}){hint}"
