"""What a task asks of Slurm: the ``sbatch`` line as a pure function of the task, and the request its job reads."""

import dataclasses
import hashlib
import math
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.task import Task

_SCRIPT = Path(__file__).resolve().parent.parent / "slurm" / "task.sbatch"
_SECRET_VARIABLE = re.compile(r"(?i)(^|_)(key|api_?key|token|secret|passwd|password|credentials?)$")
# What an enclosing job says about itself would bind the new one; these say where the cluster is.
_KEPT_SLURM_VARIABLES = ("SLURM_CONF", "SLURM_CONF_SERVER", "SLURM_JWT", "SLURM_CLUSTERS")
_OWNED = (
    "array", "chdir", "cpus-per-task", "export", "gres", "job-name", "no-requeue", "nodes", "ntasks", "open-mode",
    "ntasks-per-node", "output", "parsable", "requeue", "signal", "wait", "wrap",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class SlurmOptions:
    """How the jobs of one executor are submitted."""

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    time_s: int | None = None
    """Wall-time limit of one job in seconds, rounded up to minutes; None is the partition's own."""
    grace_s: int = 120
    """Seconds before the limit at which a job is told to write its checkpoint."""
    max_requeues: int = 100
    """How often a job that was stopped by Slurm goes back into the queue."""
    more: Sequence[str] = ()
    """Further options of sbatch, such as ``--constraint=a100``."""


def options_problems(options: SlurmOptions) -> list[str]:
    """Say what is wrong with ``options``; empty when nothing is."""
    problems = []
    for text in options.more:
        name = text.removeprefix("--").partition("=")[0]
        if not text.startswith("--") or not name:
            problems.append(f"{text!r} is not an option of sbatch; write --name or --name=value")
        elif name in _OWNED:
            problems.append(f"--{name} follows from the task and cannot be given ({text!r}); leave it out")
    if options.time_s is not None and options.time_s <= options.grace_s:
        problems.append(
            f"a time limit of {options.time_s} s leaves nothing beside the {options.grace_s} s for the last "
            "checkpoint; raise the limit or lower the grace"
        )
    return problems


def sbatch_command(
    task: Task,
    options: SlurmOptions,
    *,
    job_name: str,
    request_path: Path,
    python: str,
    working_dir: str,
    after: Sequence[int] = (),
) -> list[str]:
    """Command line that submits ``task``; prints the id of the job.

    Args:
        task: What to run.
        options: How.
        job_name: Name of the job in the queue.
        request_path: Where :func:`job_request` was, or will be, written.
        python: Interpreter on the nodes.
        working_dir: Directory that the task runs in.
        after: Jobs that must have ended first, however they ended.
    """
    log = str(Path(task.log_path).absolute()).replace("%", "%%")
    return [
        "sbatch",
        "--parsable",
        f"--job-name={job_name}",
        *size_options(task.num_nodes, task.num_cpus, task.num_gpus),
        f"--output={log}",
        "--open-mode=append",
        f"--chdir={working_dir}",
        "--export=ALL",
        "--requeue",
        f"--signal=TERM@{options.grace_s}",
        *([f"--dependency=afterany:{':'.join(map(str, after))}"] if after else []),
        *placement_options(options),
        str(_SCRIPT),
        python,
        str(request_path),
    ]


def size_options(num_nodes: int, num_cpus: int, num_gpus: int) -> list[str]:
    """The options of sbatch that say how much: nodes, and cores and GPUs, which they share equally."""
    return [
        f"--nodes={num_nodes}",
        "--ntasks-per-node=1",
        f"--cpus-per-task={num_cpus // num_nodes}",
        *([f"--gres=gpu:{num_gpus // num_nodes}"] if num_gpus else []),
    ]


def placement_options(options: SlurmOptions) -> list[str]:
    """The options of sbatch that say where and how long, for any job of a run."""
    named = (("partition", options.partition), ("account", options.account), ("qos", options.qos))
    limit = [] if options.time_s is None else [f"--time={math.ceil(options.time_s / 60)}"]
    return [*(f"--{name}={value}" for name, value in named if value), *limit, *options.more]


def job_request(task: Task, options: SlurmOptions, *, outcome_dir: Path) -> dict[str, Any]:
    """What ``python -m launch.slurm_job`` reads, as JSON values."""
    return {
        "task": task_values(task),
        "outcome_dir": str(outcome_dir.absolute()),
        "fingerprint": fingerprint(task),
        "max_requeues": options.max_requeues,
        "stop_s": options.grace_s,
    }


def task_values(task: Task) -> dict[str, Any]:
    """A task as JSON values."""
    values = dataclasses.asdict(task) | {"log_path": str(Path(task.log_path).absolute())}
    return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}


def task_of(request: Mapping[str, Any]) -> Task:
    """The task of a request: the inverse of :func:`job_request`."""
    return Task(**{**request["task"], "log_path": Path(request["task"]["log_path"])})


def fingerprint(task: Task) -> str:
    """Hash of a task; requests (``.json`` files named in its arguments) count with their content."""
    digest = hashlib.sha256(
        repr((task.name, task.module, sorted(task.env.items()), task.num_processes, task.num_nodes)).encode()
    )
    for argument in task.arguments:
        digest.update(argument.encode() + b"\0")
        path = Path(argument)
        if path.suffix == ".json" and path.is_file():
            digest.update(path.read_bytes())
    return digest.hexdigest()


def job_environment(env: Mapping[str, str], *, import_path: str) -> dict[str, str]:
    """Environment to submit from: Slurm keeps a copy of it, so nothing in it may be secret.

    Args:
        env: This process's.
        import_path: Value of ``PYTHONPATH``, so that a job finds modules where this process does.
    """
    kept = {
        name: value
        for name, value in env.items()
        if not _SECRET_VARIABLE.search(name)
        and (not name.startswith(("SLURM_", "SRUN_", "PMI")) or name in _KEPT_SLURM_VARIABLES)
    }
    return {**kept, "PYTHONPATH": import_path}


def shown(command: Sequence[str]) -> str:
    """A command line to read and to paste into a shell."""
    return shlex.join(command)
