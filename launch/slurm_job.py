"""What runs inside a job: ``python -m launch.slurm_job <request.json>``, started by ``slurm/task.sbatch``.

Runs the task, hands Slurm's stop signals on, writes how it went into ``<outcome_dir>/<job id>.json`` and puts a job
that Slurm stopped (preemption, time limit) back into the queue. The outcome is what the driver reads: it needs no
accounting, and says what failed where Slurm only knows a number.

``python -m launch.slurm_job --ended <exit code>`` does the last of it for other scripts: it requeues this job when its
work was stopped by Slurm, and exits with the code.

A task on several nodes has this on each of them, as tasks of one job step; the first one leads
(:mod:`launch.slurm_nodes`) and says how it went, the others exit with 0.

Exit codes: 0 the task succeeded; 143 it was stopped; otherwise that of the first process that failed (128 + the signal
that ended it).
"""

import json
import logging
import os
import socket
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from launch import slurm_commands
from launch.slurm_commands import SlurmError
from launch.slurm_files import outcome_path, write_json
from launch.slurm_group import STOP_SIGNALS, StopRequest
from launch.slurm_nodes import follow, leading, own_node
from launch.slurm_options import task_of
from launch.slurm_status import EXIT_STOPPED
from launch.task import State, Status

STOP_EXIT_CODES = (EXIT_STOPPED, *(128 + int(number) for number in STOP_SIGNALS))
"""Exit codes of a program that was asked to stop, whether it wrote a checkpoint or not."""
_REQUEUE_TIMEOUT_S = 60.0
_DEFAULT_MAX_REQUEUES = 100

logger = logging.getLogger("launch.slurm_job")


def run_request(path: Path) -> int:
    """Run the request in ``path`` to its end; returns the exit code of the job."""
    stop, place = StopRequest(), own_node(os.environ)
    with stop.installed():
        request = json.loads(path.read_text(encoding="utf-8"))
        job_id = int(os.environ["SLURM_JOB_ID"])
        outcome = outcome_path(Path(request["outcome_dir"]), job_id)
        meetings = outcome.parent / "nodes"
        if place.rank:
            follow(meetings, place, stop)
            return 0
        outcome.unlink(missing_ok=True)
        with leading(meetings, place) as leader:
            status = leader.run(task_of(request), stop, stop_s=float(request["stop_s"]) * 0.8)
        if status.state is not State.cancelled:
            _write(outcome, status, status.state)
            return _exit_code(status)
        if _num_restarts() >= int(request["max_requeues"]):
            _write(outcome, replace(status, reason=f"stopped by Slurm {_num_restarts() + 1} times"), State.failed)
            return EXIT_STOPPED
        if is_running_for_slurm():
            _write(outcome, status, "requeued")
            if requeue_and_wait():
                return EXIT_STOPPED
        _write(outcome, status, "stopped")
        return EXIT_STOPPED


def is_running_for_slurm() -> bool:
    """Whether this job, told to stop, may run again; one that was cancelled is over for Slurm already."""
    return slurm_commands.state_of(slurm_commands.own_job(os.environ)) in ("RUNNING", "SUSPENDED")


def requeue_and_wait() -> bool:
    """Requeue this job and wait for Slurm to end it; False when the site does not allow it."""
    job = slurm_commands.own_job(os.environ)
    logger.info("job %s goes back into the queue", job)
    try:
        slurm_commands.requeue(job)
    except SlurmError as error:
        logger.error("%s", error)
        return False
    time.sleep(_REQUEUE_TIMEOUT_S)
    return True


def end_job(exit_code: int) -> int:
    """Requeue the job that this process is part of, when ``exit_code`` says that its work was stopped."""
    if exit_code in STOP_EXIT_CODES and _num_restarts() < _DEFAULT_MAX_REQUEUES and is_running_for_slurm():
        requeue_and_wait()
    return exit_code


def _exit_code(status: Status) -> int:
    code = status.exit_code or 0
    return code if code >= 0 else 128 - code


def _write(path: Path, status: Status, state: str) -> None:
    value = {
        "name": status.name,
        "state": state,
        "exit_code": status.exit_code,
        "reason": status.reason,
        "node": os.environ.get("SLURMD_NODENAME") or socket.gethostname(),
        "restarts": _num_restarts(),
        "time": time.time(),
    }
    write_json(path, value)


def _num_restarts() -> int:
    return int(os.environ.get("SLURM_RESTART_COUNT", "0"))


def main(arguments: Sequence[str]) -> int:
    """Run what the command line says; returns the exit code."""
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(message)s")
    if len(arguments) == 2 and arguments[0] == "--ended" and arguments[1].isdigit():
        return end_job(int(arguments[1]))
    if len(arguments) != 1:
        logger.error("usage: python -m launch.slurm_job REQUEST.json | --ended EXIT_CODE; got %s", list(arguments))
        return 2
    return run_request(Path(arguments[0]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
