"""Keys ``launch.*`` and ``tracking.*``: where tasks run and where their metrics go."""

from enum import StrEnum
from typing import Literal

from pydantic import Field

from btm.schema import Model


class ExecutorName(StrEnum):
    """Where tasks run."""

    local = "local"
    ray = "ray"


class LaunchConfig(Model):
    """Who runs the tasks of a plan."""

    executor: ExecutorName = ExecutorName.local
    """local subprocesses or Ray."""
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
