"""The few commands of Slurm that are needed, and what their answers mean. No accounting is needed.

``squeue`` and ``scontrol`` first; ``sacct`` only for jobs that the controller has forgotten, where a site has it.
"""

import contextlib
import os
import re
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

_TIMEOUT_S = 60.0
_BUSY = re.compile(
    r"(?i)timed out|timeout|unable to contact|connection refused|connection reset|try again|temporarily"
    r"|unable to connect|no route to host|network is unreachable|slurmctld.*(not responding|down)"
    r"|submit ?job ?limit|maxsubmit|job violates accounting/qos policy|backup controller"
)
_FIELD = re.compile(r"(\w+)=(\S*)")
_ENDED = (
    "BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "REVOKED",
    "TIMEOUT",
)  # fmt: skip


class SlurmError(RuntimeError):
    """A command of Slurm failed."""


class BusyError(SlurmError):
    """The controller cannot be reached or takes no more jobs now; the same command may succeed later."""


@dataclass(frozen=True, kw_only=True, slots=True)
class QueuedJob:
    """One job that waits or runs."""

    job_id: int
    state: str
    """As ``squeue`` says it: PENDING, RUNNING, COMPLETING, ..."""
    reason: str
    """Why it waits."""
    node: str
    name: str


@dataclass(frozen=True, kw_only=True, slots=True)
class EndedJob:
    """How a job ended, as Slurm says."""

    state: str
    """COMPLETED, FAILED, CANCELLED, TIMEOUT, NODE_FAIL, OUT_OF_MEMORY, ..."""
    exit_code: int
    signal: int
    node: str = ""


def run(command: Sequence[str], env: Mapping[str, str] | None = None) -> str:
    """Output of a command.

    Raises:
        BusyError: If it may succeed later.
        SlurmError: If it fails otherwise, or is not installed.
    """
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, env=env, check=False)
    except FileNotFoundError:
        raise SlurmError(
            f"{command[0]} is not on this machine; submit from a login node of the cluster, or take launch=local"
        ) from None
    except subprocess.TimeoutExpired:
        raise BusyError(f"{command[0]} did not answer for {_TIMEOUT_S:g} s") from None
    if done.returncode:
        text = " ".join((done.stderr or done.stdout).split()) or f"exit code {done.returncode}"
        raise (BusyError if _BUSY.search(text) else SlurmError)(f"{command[0]}: {text}")
    return done.stdout


def submit(command: Sequence[str], env: Mapping[str, str] | None = None) -> int:
    """Run an ``sbatch --parsable`` line; returns the id of the job."""
    answer = run(command, env).strip().partition(";")[0]
    if not answer.isdigit():
        raise SlurmError(f"sbatch answered {answer!r} where the id of a job was expected")
    return int(answer)


def queue() -> dict[int, QueuedJob]:
    """This user's jobs that have not left the queue, by id; elements of arrays under ids of their own.

    Raises:
        SlurmError: If ``squeue`` fails.
    """
    lines = run(["squeue", "--noheader", "--array", f"--user={os.getuid()}", "--format=%A|%T|%r|%N|%j"]).splitlines()
    jobs = {}
    for line in lines:
        job_id, state, reason, node, name = line.split("|", 4)
        jobs[int(job_id)] = QueuedJob(job_id=int(job_id), state=state, reason=reason, node=node, name=name)
    return jobs


def ended_job(job_id: int) -> EndedJob | None:
    """How a job ended; None when nobody knows (any more), or it has not ended."""
    fields = _record(str(job_id))
    if "JobState" in fields:
        return _ended(fields["JobState"], fields.get("ExitCode", "0:0"), fields.get("NodeList", ""))
    with contextlib.suppress(SlurmError):
        command = ["sacct", "--noheader", "--parsable2", "--allocations", f"--jobs={job_id}"]
        lines = run([*command, "--format=JobIDRaw,State,ExitCode,NodeList"]).splitlines()
        for line in lines:
            raw_id, state, exit_code, node = line.split("|")
            if raw_id == str(job_id):
                return _ended(state.split()[0], exit_code, node)
    return None


def own_job(env: Mapping[str, str]) -> str:
    """What Slurm calls the job that this process is part of; the number alone may mean a whole array."""
    if "SLURM_ARRAY_TASK_ID" in env:
        return f"{env['SLURM_ARRAY_JOB_ID']}_{env['SLURM_ARRAY_TASK_ID']}"
    return env["SLURM_JOB_ID"]


def node_address(node: str) -> str | None:
    """Address or name under which Slurm's own daemons reach a node; None when the controller does not answer."""
    with contextlib.suppress(SlurmError):
        return dict(_FIELD.findall(run(["scontrol", "--oneliner", "show", "node", node]))).get("NodeAddr")
    return None


def state_of(job: str) -> str | None:
    """State of a job (``7``) or of one element of an array (``7_0``) now; None when the controller does not answer."""
    return _record(job).get("JobState")


def _record(job: str) -> dict[str, str]:
    """What the controller knows of a job; empty when it does not answer or has forgotten it."""
    with contextlib.suppress(SlurmError):
        for line in run(["scontrol", "--oneliner", "show", "job", job]).splitlines():
            fields = dict(_FIELD.findall(line))
            # The number of an array is also that of one of its elements.
            if job in (fields.get("JobId"), f"{fields.get('ArrayJobId')}_{fields.get('ArrayTaskId')}"):
                return fields
    return {}


def cancel(job_ids: Sequence[int]) -> None:
    """Cancel jobs: TERM to their steps, KILL after the site's ``KillWait``; those that have ended are left alone."""
    if job_ids:
        with contextlib.suppress(SlurmError):
            run(["scancel", "--quiet", *map(str, job_ids)])


def requeue(job: str) -> None:
    """End a running job, or one element of an array, and put it back into the queue under the same id.

    Raises:
        SlurmError: If the site does not allow it.
    """
    run(["scontrol", "requeue", job])


def start_soon(job_id: int) -> None:
    """Spare a requeued job most of the two minutes that Slurm lets it wait.

    Not all of them: within the second in which its credential was revoked the node refuses it, and the job fails.
    """
    with contextlib.suppress(SlurmError):
        run(["scontrol", "update", f"JobId={job_id}", "StartTime=now+5"])


def _ended(state: str, exit_code: str, node: str) -> EndedJob | None:
    if state not in _ENDED:
        return None
    code, _, number = exit_code.partition(":")
    return EndedJob(state=state, exit_code=int(code or 0), signal=int(number or 0), node=node)
