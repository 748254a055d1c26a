"""Tasks as jobs of a Slurm cluster: one job per task; driver and nodes share a file system and nothing else.

What a job says about itself (:mod:`launch.slurm_job`) counts first, then ``squeue``, ``scontrol`` and, where there is
accounting, ``sacct``. A task has succeeded when its processes have, never because a job is called COMPLETED.
"""

import os
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from launch import slurm_commands
from launch.process import added_import_path
from launch.slurm_commands import BusyError, QueuedJob, SlurmError
from launch.slurm_files import StateDir, read_json, write_json
from launch.slurm_options import (
    SlurmOptions,
    fingerprint,
    job_environment,
    job_request,
    options_problems,
    sbatch_command,
    shown,
)
from launch.slurm_status import EXIT_REFUSED, EXIT_STOPPED, HOPELESS, job_name, status_of_ended, status_of_outcome
from launch.supervisor import absolute
from launch.task import State, Status, Task
from launch.task_queue import TaskQueue, check_num_groups

_OUTCOME_INTERVAL_S = 0.5
_BUSY_INTERVAL_S = 10.0
_SILENCE_S = 30.0
_MOST_SUBMISSIONS = 20
_CLOSE_TIMEOUT_S = 60.0
_NEVER = float("-inf")


@dataclass(slots=True, eq=False)
class _Job:
    """A task that has been handed to Slurm."""

    task: Task
    job_id: int
    judged: float
    """Time of the listing of the queue that was looked at last; older ones do not know the job."""
    is_cancelled: bool = False
    is_hurried: bool = False
    silent_since: float | None = None


class SlurmExecutor:
    """Runs each task as a job; implements :class:`launch.task.Executor`.

    Jobs outlive a driver that is killed: the next one with the same ``state_dir`` finds them by their names and goes on
    with them. A job that Slurm stops (preemption, time limit, a lost node) goes back into the queue by itself; its task
    stays unfinished and no restart is counted. Use it from one thread.

    Args:
        state_dir: Directory on the shared file system for requests and outcomes.
        options: Partition, account, limits.
        num_groups: Most jobs in the queue at the same time; None hands over everything.
        poll_s: Seconds between two calls of ``squeue``; outcomes are looked for more often.
        python: Interpreter on the nodes; None is this one.

    Raises:
        ValueError: If ``num_groups`` is less than 1 or the options contradict each other.
        SlurmError: If this machine has no Slurm to submit to.
    """

    def __init__(
        self,
        state_dir: Path,
        *,
        options: SlurmOptions | None = None,
        num_groups: int | None = None,
        poll_s: float = 5.0,
        python: str | None = None,
    ) -> None:
        self._options = options or SlurmOptions()
        if problems := options_problems(self._options):
            raise ValueError("; ".join(problems))
        if shutil.which("sbatch") is None:
            raise SlurmError("sbatch is not on this machine; run on a login node of the cluster, or take launch=local")
        self._state = StateDir(Path(state_dir).absolute())
        self._num_groups = check_num_groups(num_groups)
        self._poll_s = poll_s
        self._python = python or sys.executable
        self._queue = TaskQueue()
        self._jobs: dict[str, _Job] = {}
        self._listed: dict[int, QueuedJob] = {}
        self._listed_time = _NEVER
        self._asked_time = _NEVER
        self._looked_time = _NEVER
        self._busy_until = _NEVER
        self._over: set[int] = set()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def submit(self, task: Task) -> None:
        """Queue ``task``; the next :meth:`poll` hands it to Slurm.

        Raises:
            ValueError: If the task is malformed or its name is that of a task that has not ended.
            RuntimeError: If the executor is closed.
        """
        self._queue.add(absolute(task), problem=None)

    def poll(self) -> dict[str, Status]:
        """Status of every task submitted so far, by name; a queued one says what Slurm has it wait for."""
        now = time.monotonic()
        if self._jobs and now - self._looked_time >= _OUTCOME_INTERVAL_S:
            self._looked_time = now
            self._refresh(now)
            for name, job in list(self._jobs.items()):
                self._take(name, job)
        if not self._queue.is_closed and self._queue.waiting and now >= self._busy_until:
            self._start_what_fits(now)
        return dict(self._queue.statuses)

    def cancel(self, name: str, *, grace_s: float = 10.0) -> None:
        """Cancel a task's job: TERM at once, KILL after the site's ``KillWait``, whatever ``grace_s`` is.

        Raises:
            ValueError: If no task of this name was submitted.
        """
        del grace_s
        if self._queue.is_over(name):
            return
        if name in self._jobs:
            self._jobs[name].is_cancelled = True
            slurm_commands.cancel([self._jobs[name].job_id])
        else:
            self._queue.withdraw(name)

    def close(self) -> None:
        """Cancel every job of this executor that has not ended, and wait until Slurm has ended them. Idempotent."""
        if self._queue.is_closed:
            return
        self._queue.is_closed = True
        for task in list(self._queue.waiting):
            self._queue.withdraw(task.name)
        for job in self._jobs.values():
            job.is_cancelled = True
        slurm_commands.cancel([job.job_id for job in self._jobs.values()])
        deadline = time.monotonic() + _CLOSE_TIMEOUT_S
        self._poll_s = min(self._poll_s, 1.0)
        while self._jobs and time.monotonic() < deadline:
            self.poll()
            time.sleep(_OUTCOME_INTERVAL_S)

    def _refresh(self, now: float) -> None:
        """Ask what is in the queue, unless that was done a moment ago; a controller that is away changes nothing."""
        if now - self._asked_time < self._poll_s:
            return
        self._asked_time = now
        try:
            self._listed = slurm_commands.queue()
            self._listed_time = now
        except BusyError:
            return

    def _start_what_fits(self, now: float) -> None:
        room = _MOST_SUBMISSIONS
        if self._num_groups is not None:
            room = min(room, self._num_groups - len(self._jobs))
        try:
            # Jobs that an earlier driver left must be known before another one is submitted.
            if self._listed_time == _NEVER:
                self._listed = slurm_commands.queue()
                self._listed_time = self._asked_time = now
            for _ in range(min(room, len(self._queue.waiting))):
                self._start(self._queue.waiting[0])
                self._queue.waiting.popleft()
        except BusyError as error:
            self._busy_until = now + _BUSY_INTERVAL_S
            self._queue.set(self._queue.waiting[0].name, State.queued, str(error))

    def _start(self, task: Task) -> None:
        """Hand over one task, or go on with the job that an earlier driver submitted for it."""
        living = self._living(job_name(task.name, self._state.path))
        if len(living) == 1 and read_json(self._state.request(task.name)).get("fingerprint") == fingerprint(task):
            self._jobs[task.name] = _Job(task, living[0].job_id, self._listed_time)
            return
        # Jobs for an outdated request would be in the way of the new one.
        outdated = [job.job_id for job in living]
        slurm_commands.cancel(outdated)
        write_json(self._state.request(task.name), job_request(task, self._options, outcome_dir=self._state.outcomes))
        Path(task.log_path).parent.mkdir(parents=True, exist_ok=True)
        environment = job_environment(os.environ, import_path=added_import_path(sys.path))
        command = submission(task, self._options, self._state, python=self._python, after=outdated)
        try:
            self._jobs[task.name] = _Job(task, slurm_commands.submit(command, environment), time.monotonic())
        except BusyError:
            raise
        except SlurmError as error:
            status = Status(name=task.name, state=State.failed, exit_code=EXIT_REFUSED, reason=str(error))
            self._queue.statuses[task.name] = status

    def _living(self, name: str) -> list[QueuedJob]:
        """Jobs in the queue under this name that an earlier driver submitted."""
        return [
            job
            for job in self._listed.values()
            if job.name == name and job.state != "COMPLETING" and job.job_id not in self._over
        ]

    def _take(self, name: str, job: _Job) -> None:
        """Bring the status of one job up to date."""
        status = status_of_outcome(name, self._state.outcome(job.job_id))
        if status is None and self._listed_time > job.judged:
            job.judged = self._listed_time
            listed = self._listed.get(job.job_id)
            status = self._status_of_listed(name, job, listed) if listed else self._status_of_gone(name, job)
        if status is None:
            return
        if status.is_final and job.is_cancelled and status.state is not State.succeeded:
            status = Status(name=name, state=State.cancelled, exit_code=status.exit_code, reason="cancelled")
        self._queue.statuses[name] = status
        if status.is_final:
            self._over.add(job.job_id)
            self._jobs.pop(name)

    def _status_of_listed(self, name: str, job: _Job, listed: QueuedJob) -> Status:
        job.silent_since = None
        if listed.state != "PENDING":
            job.is_hurried = False
            return Status(name=name, state=State.running, reason=f"job {job.job_id} on {listed.node}")
        if listed.reason in HOPELESS and not job.is_cancelled:
            slurm_commands.cancel([job.job_id])
            reason = f"job {job.job_id} would wait for ever ({listed.reason}): {HOPELESS[listed.reason]}"
            return Status(name=name, state=State.failed, exit_code=EXIT_REFUSED, reason=reason)
        begins_later = any(option.startswith("--begin") for option in self._options.more)
        if listed.reason == "BeginTime" and not job.is_hurried and not begins_later:
            job.is_hurried = True
            slurm_commands.start_soon(job.job_id)
        return Status(name=name, state=State.queued, reason=f"job {job.job_id} waits: {listed.reason}")

    def _status_of_gone(self, name: str, job: _Job) -> Status | None:
        """Of a job that has left the queue without a final word of its own."""
        ended = slurm_commands.ended_job(job.job_id)
        if ended is None:
            job.silent_since = self._listed_time if job.silent_since is None else job.silent_since
            if self._listed_time - job.silent_since < _SILENCE_S:
                return None
            reason = f"job {job.job_id} has left the queue, and neither it nor Slurm says how it ended"
            return Status(name=name, state=State.failed, reason=reason)
        if self._state.outcome(job.job_id).get("state") == "stopped" and ended.state != "CANCELLED":
            reason = f"job {job.job_id} was stopped by Slurm and may not requeue itself here"
            return Status(name=name, state=State.failed, exit_code=EXIT_STOPPED, reason=reason)
        return status_of_ended(name, job.job_id, ended)


def submission(
    task: Task, options: SlurmOptions, state: StateDir, *, python: str | None = None, after: Sequence[int] = ()
) -> list[str]:
    """The ``sbatch`` line of ``task`` in the run of ``state``."""
    return sbatch_command(
        absolute(task),
        options,
        job_name=job_name(task.name, state.path),
        request_path=state.request(task.name),
        python=python or sys.executable,
        working_dir=os.getcwd(),
        after=after,
    )


def submission_text(task: Task, options: SlurmOptions, state_dir: Path) -> str:
    """The same, to be read and to be pasted into a shell."""
    return shown(submission(task, options, StateDir(Path(state_dir).absolute())))
