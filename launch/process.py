"""What one process of a task is given: command line, environment, cores, log. Pure functions of the task.

The fork server and its clients exchange these records as JSON.
"""

import dataclasses
import json
import os
import sys
import sysconfig
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from launch.nodes import Node
from launch.resources import Allocation
from launch.task import Task

RENDEZVOUS_VARIABLE = "RENDEZVOUS_FILE"
_MEETING_VARIABLES = (RENDEZVOUS_VARIABLE, "MASTER_ADDR", "MASTER_PORT")
_THREAD_VARIABLE = "OMP_NUM_THREADS"
# Read once, when an interpreter or a library is loaded: a fork of a running interpreter would ignore a new value.
_READ_AT_START = ("PYTHON", "LD_", "OMP_", "GOMP_", "KMP_", "MKL_", "OPENBLAS_", "MALLOC_", "GLIBC_", "TORCH_", "ATEN_")


@dataclass(frozen=True, kw_only=True, slots=True)
class ProcessSpec:
    """One process to start."""

    module: str
    arguments: tuple[str, ...]
    env: dict[str, str]
    """The whole environment."""
    log_path: str
    working_dir: str
    cores: tuple[int, ...]
    """Cores it may run on; empty leaves them as they are."""
    num_threads: int
    """Threads of one parallel operation."""
    is_forked: bool
    """Fork the preloaded interpreter; False starts a fresh one."""

    def to_json(self) -> dict[str, Any]:
        """Plain values that JSON can hold."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        """The inverse of :meth:`to_json`."""
        return cls(**{**value, "arguments": tuple(value["arguments"]), "cores": tuple(value["cores"])})


def process_specs(
    task: Task,
    allocation: Allocation,
    *,
    env: Mapping[str, str],
    working_dir: str,
    rendezvous_file: str,
    node: Node | None = None,
) -> list[ProcessSpec]:
    """One record per process of ``task``, in the order of ranks.

    Args:
        task: What to run; of a task on several nodes the share of this one.
        allocation: Cores and GPUs of the whole group.
        env: Environment that the task's own variables are added to.
        working_dir: Directory to run in.
        rendezvous_file: Path that does not exist yet, on this node.
        node: Which of several nodes this one is.
    """
    num_threads = max(1, len(allocation.cores) // task.num_processes)
    is_forked = not needs_fresh_interpreter(task.env)
    return [
        ProcessSpec(
            module=task.module,
            arguments=tuple(task.arguments),
            env=rank_environment(task, rank, allocation, env=env, rendezvous_file=rendezvous_file, node=node),
            log_path=str(Path(task.log_path).absolute()),
            working_dir=working_dir,
            cores=allocation.cores,
            num_threads=int(task.env.get(_THREAD_VARIABLE, num_threads)),
            is_forked=is_forked,
        )
        for rank in range(task.num_processes)
    ]


def rank_environment(
    task: Task,
    rank: int,
    allocation: Allocation,
    *,
    env: Mapping[str, str],
    rendezvous_file: str,
    node: Node | None = None,
) -> dict[str, str]:
    """Environment of one process: ``env``, then what the group gives it, then the task's own variables, then its rank.

    ``CUDA_VISIBLE_DEVICES`` names exactly the GPUs of the group, so a task without GPUs sees none. ``rank`` is that
    among the processes of this node.
    """
    node = node or Node()
    num_threads = max(1, len(allocation.cores) // task.num_processes)
    meeting: dict[str, str] = {RENDEZVOUS_VARIABLE: rendezvous_file}
    if node.count > 1:
        host, _, port = node.address.rpartition(":")
        meeting = {"MASTER_ADDR": host.strip("[]"), "MASTER_PORT": port}
    outer = {name: value for name, value in env.items() if name not in _MEETING_VARIABLES}
    return {
        **outer,
        _THREAD_VARIABLE: str(num_threads),
        "CUDA_VISIBLE_DEVICES": ",".join(allocation.gpus),
        **task.env,
        "RANK": str(node.rank * task.num_processes + rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(node.count * task.num_processes),
        "LOCAL_WORLD_SIZE": str(task.num_processes),
        **meeting,
    }


def needs_fresh_interpreter(task_env: Mapping[str, str]) -> bool:
    """Whether a task sets variables that only a newly started interpreter obeys."""
    return any(name.startswith(_READ_AT_START) and name != _THREAD_VARIABLE for name in task_env)


def interpreter_command(spec: ProcessSpec) -> list[str]:
    """Command line of a fresh interpreter that runs ``spec``.

    ``-P``: a folder or file in the working directory must not hide an installed package of the same name.
    """
    return [sys.executable, "-P", "-m", spec.module, *spec.arguments]


def added_import_path(paths: Sequence[str]) -> str:
    """A ``PYTHONPATH`` of those entries of ``paths`` (a ``sys.path``) that a fresh interpreter does not have anyway."""
    stdlib = sysconfig.get_path("stdlib")
    own = {sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib", "scripts")}
    own.add(os.path.join(os.path.dirname(stdlib), f"python{sys.version_info.major}{sys.version_info.minor}.zip"))
    candidates = [os.path.abspath(path) for path in paths if os.pathsep not in path]
    added = [path for path in candidates if path not in own and not path.startswith(stdlib + os.sep)]
    return os.pathsep.join(path for path in added if os.path.exists(path))


def check_task(task: Task) -> None:
    """Refuse a task that no executor could run.

    Raises:
        ValueError: If a count is out of range, or the command line or environment holds a NUL character.
    """
    if not task.name:
        raise ValueError("the name of a task must not be empty; give it one")
    for field, value, least in (
        ("num_processes", task.num_processes, 1),
        ("num_cpus", task.num_cpus, 1),
        ("num_gpus", task.num_gpus, 0),
        ("num_nodes", task.num_nodes, 1),
    ):
        if value < least:
            raise ValueError(f"{field} of task {task.name!r} must be at least {least}, got {value}")
    for field, value in (
        ("num_processes", task.num_processes),
        ("num_cpus", task.num_cpus),
        ("num_gpus", task.num_gpus),
    ):
        if value % task.num_nodes:
            raise ValueError(
                f"{field} of task {task.name!r} must be a multiple of its num_nodes ({task.num_nodes}), got {value}"
            )
    texts = [task.module, str(task.log_path), *task.arguments, *task.env, *task.env.values()]
    broken = next((text for text in texts if "\0" in text), None)
    if broken is not None:
        raise ValueError(f"task {task.name!r} holds a NUL character in {broken!r}; the system cannot pass it on")
    threads = task.env.get(_THREAD_VARIABLE, "1")
    if not threads.isdigit() or int(threads) < 1:
        raise ValueError(f"{_THREAD_VARIABLE} of task {task.name!r} must be a positive number, got {threads!r}")


def encode(message: Mapping[str, Any]) -> bytes:
    """One message of the channel: a line of JSON."""
    return json.dumps(message).encode() + b"\n"


class MessageBuffer:
    """Cuts the bytes of a channel into messages."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> list[dict[str, Any]]:
        """Add received bytes; returns the messages that are complete now."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        return [json.loads(line) for line in lines]
