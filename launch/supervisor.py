"""What a cluster runs beside a task, on the task's node: an actor's class, free of Ray.

The task's processes are children of a fork server of this process: a method call of an actor cannot be cancelled, a
process can. When the actor's process dies, the fork server notices and kills them.
"""

import asyncio
import contextlib
import dataclasses
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from launch.fork_client import ForkServer
from launch.group import Group
from launch.nodes import Node, free_port, node_share
from launch.resources import Allocation, CoreLeases, available_cores, visible_gpus
from launch.task import Status, Task

_POLL_INTERVAL_S = 0.02


class Supervisor:
    """Runs tasks on the node where it is made, one after the other.

    Args:
        working_dir: Directory to run in, when this node has it.
        lease_group: Supervisors of one group on one node choose different cores.
        import_path: Where the driver looks for modules, beyond what every interpreter has (``os.pathsep`` between).
        preload: Modules imported once for all processes of its tasks.
        grace_s: Seconds between TERM and KILL when a process has failed.
    """

    def __init__(
        self,
        working_dir: str,
        *,
        lease_group: str,
        import_path: str = "",
        preload: Sequence[str] = (),
        grace_s: float = 10.0,
    ) -> None:
        sys.path += [path for path in import_path.split(os.pathsep) if path and path not in sys.path]
        with contextlib.suppress(OSError):
            os.chdir(working_dir)
        self._grace_s = grace_s
        self._preload = tuple(preload)
        self._server = ForkServer(preload)
        self._leases = CoreLeases(lease_group)
        self._group: Group | None = None

    async def meet(self, address_of_node: Callable[[], str]) -> str:
        """``host:port`` on this node, where the processes of several nodes can meet."""
        return f"{address_of_node()}:{free_port()}"

    async def start(self, task: Task, rank: int = 0, address: str = "") -> None:
        """Start the processes of this node; the task before must have ended.

        Args:
            task: The whole task.
            rank: Which of its nodes this one is.
            address: What :meth:`meet` of the first node returned, where there are several.
        """
        node, task = Node(rank=rank, count=task.num_nodes, address=address), node_share(task, rank)
        cores = self._leases.take(available_cores(), task.num_cpus)
        gpus = visible_gpus(os.environ.get("CUDA_VISIBLE_DEVICES", ""))[: task.num_gpus]
        # The cluster's own variables (among them where its token is) are none of the task's business.
        env = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        allocation = Allocation(cores=cores, gpus=gpus)
        if not self._server.is_alive:
            self._server = ForkServer(self._preload)
        self._group = Group(task, allocation, self._server, env=env, grace_s=self._grace_s, node=node)

    async def wait(self, started: None) -> Status:
        """Return the final status, once all processes have ended.

        Args:
            started: What :meth:`start` returned; a cluster runs calls in order only where one needs the other's result.
        """
        del started
        assert self._group is not None
        while True:
            self._server.poll()
            status = self._group.update()
            if status.is_final:
                self._leases.release(self._group.allocation.cores)
                return status
            await asyncio.sleep(_POLL_INTERVAL_S)

    async def cancel(self, grace_s: float) -> None:
        """TERM to all processes, KILL after ``grace_s`` seconds."""
        assert self._group is not None
        self._group.cancel(grace_s)

    async def end_with_others(self) -> None:
        """End the processes because another node of the task has failed."""
        assert self._group is not None
        self._group.end_with_others()


def absolute(task: Task) -> Task:
    """The task with a log path that means the same in every working directory."""
    return dataclasses.replace(task, log_path=Path(task.log_path).absolute(), env=dict(task.env))
