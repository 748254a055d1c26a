"""What the words of a job and of Slurm mean for a task: pure functions."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from launch.slurm_commands import EndedJob
from launch.task import State, Status

EXIT_REFUSED = 1
"""Exit code given to what a repetition cannot repair: a job that was refused, or that somebody cancelled."""
EXIT_STOPPED = 143
"""Exit code (128 + TERM) of what was asked to stop."""
HOPELESS = {
    "AccountNotAllowed": "its account may not use the partition",
    "BadConstraints": "no node has what it asks for",
    "DependencyNeverSatisfied": "a job that it waits for has failed",
    "InvalidAccount": "there is no such account",
    "InvalidQOS": "there is no such quality of service",
    "JobHeldAdmin": "an administrator, or Slurm after a failed start, holds it",
    "PartitionNodeLimit": "the partition has too few nodes",
    "PartitionTimeLimit": "its time limit is above that of the partition",
    "launch failed requeued held": "Slurm could not start it on a node, and holds it",
}
"""Reasons for which a waiting job would wait for ever."""
_REMEDIES = {
    "TIMEOUT": "it could not write its checkpoint in time; raise launch.slurm.grace_s or launch.slurm.time_s",
    "OUT_OF_MEMORY": "give it more with launch.slurm.more=[--mem=...]",
    "CANCELLED": "somebody cancelled it, so it is not started again by itself",
}


def job_name(task_name: str, state_dir: Path) -> str:
    """Name of the job of a task: says which run it belongs to, so that a new driver finds it."""
    return f"{task_name}.{tag_of(state_dir)}"


def tag_of(state_dir: Path) -> str:
    """Mark at the end of the names of all jobs of one run."""
    return hashlib.sha256(str(Path(state_dir).absolute()).encode()).hexdigest()[:8]


def status_of_outcome(name: str, outcome: Mapping[str, Any]) -> Status | None:
    """What a job's own word says; None while it has said nothing final."""
    if outcome.get("state") not in (State.succeeded, State.failed):
        return None
    state = State(outcome["state"])
    reason = f"{outcome.get('reason')} (on {outcome.get('node')})" if state is State.failed else ""
    return Status(name=name, state=state, exit_code=outcome.get("exit_code"), reason=reason)


def status_of_ended(name: str, job_id: int, ended: EndedJob) -> Status:
    """What Slurm's word means for a task whose job said nothing."""
    if ended.state == "COMPLETED" and not ended.exit_code and not ended.signal:
        return Status(name=name, state=State.succeeded, exit_code=0)
    remedy = f"; {_REMEDIES[ended.state]}" if ended.state in _REMEDIES else ""
    where = f" on {ended.node}" if ended.node and ended.node != "(null)" else ""
    reason = f"job {job_id} ended{where} as {ended.state} {ended.exit_code}:{ended.signal}{remedy}"
    code = None
    if ended.state == "CANCELLED":
        code = EXIT_REFUSED
    elif ended.state == "FAILED":
        code = -ended.signal if ended.signal else ended.exit_code or None
    return Status(name=name, state=State.failed, exit_code=code, reason=reason)
