"""Keys ``launch.*`` and ``tracking.*``: where tasks run and where their metrics go."""

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
    more: list[str] = []
    """Further options of sbatch, such as ``--constraint=a100`` or ``--mem=64G``."""


class LaunchConfig(Model):
    """Who runs the tasks of a plan."""

    executor: ExecutorName = ExecutorName.local
    """local subprocesses, Ray, or one Slurm job per task."""
    cpus_per_elm: int = Field(default=1, ge=1)
    """Cores of one ELM's group."""
    gpus_per_elm: int = Field(default=0, ge=0)
    """GPUs of one ELM's group."""
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
    """How jobs are submitted with ``launch=slurm``."""


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
