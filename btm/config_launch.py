"""Keys ``launch.*`` and ``tracking.*``: where tasks run and where their metrics go."""

from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

from pydantic import Field

from btm.schema import Model


class ExecutorName(StrEnum):
    """Where tasks run."""

    local = "local"
    ray = "ray"
    slurm = "slurm"


class SlurmAction(StrEnum):
    """What ``btm slurm`` does."""

    jobs = "jobs"
    follow = "follow"
    cancel = "cancel"
    array = "array"


class SlurmConfig(Model):
    """How ``launch=slurm`` submits its jobs."""

    partition: str | None = None
    """Partition; null is the site's default."""
    account: str | None = None
    """Account that pays."""
    qos: str | None = None
    """Quality of service."""
    time_s: int | None = Field(default=None, ge=60)
    """Seconds of wall time of one job, rounded up to minutes; null is the partition's default. A job that needs more goes back into the queue and continues."""
    grace_s: int = Field(default=120, ge=10, le=65_535)
    """Seconds before the limit at which a job is told to write its checkpoint; Slurm may tell it a minute early."""
    max_requeues: int = Field(default=100, ge=0)
    """How often a job that Slurm stopped (preemption, limit) goes back into the queue."""
    poll_s: float = Field(default=5.0, gt=0)
    """Seconds between two calls of squeue."""
    cpus_per_node: int | None = Field(default=None, ge=1)
    """Cores that the seed, the dense model and the preparation take; null is ``cpus_per_elm``."""
    gpus_per_node: int | None = Field(default=None, ge=0)
    """GPUs that the seed and the dense model take; null is ``gpus_per_elm``."""
    num_nodes: int | None = Field(default=None, ge=1)
    """Nodes that the seed, the dense and the sparse model train on, each with what the two keys above say; null is ``nodes_per_elm``."""
    more: list[str] = []
    """Further options of sbatch, such as ``--constraint=a100`` or ``--mem=64G``."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupSize:
    """What one ELM trains on."""

    num_cpus: int
    num_gpus: int
    num_processes: int
    num_nodes: int = 1
    """Nodes that share them out equally."""


class GroupConfig(Model):
    """Some ELMs that train on more, or on less, than the others."""

    elms: list[str]
    """Names of the ELMs (or of the domains that join a DEMix model), at least one; each in one group only."""
    cpus_per_elm: int | None = Field(default=None, ge=1)
    """Cores of each of them; null is ``launch.cpus_per_elm``, or ``num_processes`` where that is more."""
    gpus_per_elm: int | None = Field(default=None, ge=0)
    """GPUs of each of them; null is ``launch.gpus_per_elm``."""
    nodes_per_elm: int | None = Field(default=None, ge=1)
    """Nodes of each of them; null is ``launch.nodes_per_elm``."""
    num_processes: int | None = Field(default=None, ge=1)
    """Data-parallel processes of each of them; null is one per GPU, or ``engine.num_processes``."""


class LaunchConfig(Model):
    """Who runs the tasks of a plan."""

    executor: ExecutorName = ExecutorName.local
    """local subprocesses, Ray, or one Slurm job per task."""
    cpus_per_elm: int = Field(default=1, ge=1)
    """Cores of one ELM's group."""
    gpus_per_elm: int = Field(default=0, ge=0)
    """GPUs of one ELM's group."""
    nodes_per_elm: int = Field(default=1, ge=1)
    """Nodes that share out cores, GPUs and processes of one ELM equally; more than 1 needs Slurm, or Ray on a cluster."""
    groups: dict[str, GroupConfig] = {}
    """Any name -> ELMs of another size than the others, such as ``launch.groups.large={elms: [code], gpus_per_elm: 8}``."""
    num_groups: int | None = Field(default=None, ge=1)
    """ELMs that train at the same time; null is as many as the machine or cluster holds."""
    max_restarts: int = Field(default=2, ge=0)
    """Restarts of a task that died; one that was asked to stop and has left a new checkpoint does not count."""
    ray_address: str | None = None
    """Address of an existing Ray cluster; null starts a private one on this machine."""
    ray_dashboard: bool = False
    """Serve Ray's dashboard on loopback."""
    poll_interval_s: float = Field(default=0.2, gt=0, le=60)
    """Seconds between two looks at the running tasks."""
    slurm: SlurmConfig = SlurmConfig()
    """How ``launch=slurm`` submits its jobs."""

    def size_of(self, elm: str, *, num_processes: int) -> GroupSize:
        """Cores, GPUs and processes of one ELM: those of its group, and where that says nothing, those of all.

        Args:
            elm: Name of the ELM.
            num_processes: Of an ELM in no group, ``engine.num_processes``.
        """
        group = next((group for group in self.groups.values() if elm in group.elms), None)
        gpus = self.gpus_per_elm if group is None or group.gpus_per_elm is None else group.gpus_per_elm
        nodes = self.nodes_per_elm if group is None else group.nodes_per_elm or self.nodes_per_elm
        asked = None if group is None else group.num_processes
        processes = asked or max(gpus, num_processes)
        cpus = self.cpus_per_elm if group is None else group.cpus_per_elm or max(self.cpus_per_elm, processes)
        return GroupSize(num_cpus=cpus, num_gpus=gpus, num_processes=processes, num_nodes=nodes)

    @property
    def cpus_on_one_node(self) -> int:
        """Cores of what runs on one node only, where ELMs may have several."""
        return max(1, self.cpus_per_elm // self.nodes_per_elm)


def node_problems(launch: LaunchConfig, *, num_processes: int) -> list[str]:
    """List what the nodes of an ELM cannot share out equally, worded for the user.

    Args:
        launch: Holds the sizes.
        num_processes: ``engine.num_processes``.
    """
    named = {"launch.nodes_per_elm": ""} | {
        f"launch.groups.{name}.nodes_per_elm": group.elms[0] for name, group in launch.groups.items() if group.elms
    }
    problems = []
    for key, elm in named.items():
        size = launch.size_of(elm, num_processes=num_processes)
        shared = {"processes": size.num_processes, "cores": size.num_cpus, "GPUs": size.num_gpus}
        problems += [
            f"{key}={size.num_nodes} must divide the {count} {what} of an ELM, so that its nodes have equally many"
            for what, count in shared.items()
            if count % size.num_nodes
        ]
    return problems


def group_problems(launch: LaunchConfig, *, num_processes: int, tensor_parallel: int = 1) -> list[str]:
    """List contradictions between the groups, worded for the user.

    Args:
        launch: Holds the groups.
        num_processes: ``engine.num_processes``.
        tensor_parallel: ``engine.tensor_parallel``, which divides the processes of every model.
    """
    problems = []
    owners: dict[str, str] = {}
    for name, group in launch.groups.items():
        key = f"launch.groups.{name}"
        if not group.elms:
            problems.append(f"{key}.elms must name at least one ELM, got []; leave the group out")
        for elm in group.elms:
            if (other := owners.setdefault(elm, name)) != name:
                problems.append(f"{key}.elms names {elm!r}, which is in launch.groups.{other} already; name it in one")
        if duplicates := sorted({elm for elm in group.elms if group.elms.count(elm) > 1}):
            problems.append(f"{key}.elms must name each ELM once, got {duplicates} more than once")
        size = launch.size_of(group.elms[0], num_processes=num_processes) if group.elms else None
        if size and size.num_cpus < size.num_processes:
            problems.append(
                f"{key}.cpus_per_elm must be at least its number of processes ({size.num_processes}), "
                f"got {size.num_cpus}"
            )
        if size and size.num_processes % tensor_parallel:
            problems.append(
                f"{key}.num_processes must be a multiple of engine.tensor_parallel ({tensor_parallel}), "
                f"got {size.num_processes}"
            )
        if size and 0 < size.num_gpus < size.num_processes:
            problems.append(
                f"{key}.num_processes must be at most gpus_per_elm ({size.num_gpus}), so that each has a GPU, "
                f"got {size.num_processes}"
            )
    return problems


class TrackerName(StrEnum):
    """Where metrics are mirrored; JSON lines are always written."""

    none = "none"
    wandb = "wandb"


class TrackingConfig(Model):
    """Experiment tracking beside the JSON-lines metrics."""

    name: TrackerName = TrackerName.none
    """Mirror."""
    mode: Literal["online", "offline"] = "offline"
    """W&B mode; keys come from the environment only."""
    project: str = "btm"
    """W&B project."""
    entity: str | None = None
    """W&B entity."""
