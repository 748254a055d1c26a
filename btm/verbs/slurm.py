"""``btm slurm``: the Slurm jobs of a forest: ``action=jobs`` lists, ``follow`` waits for, ``cancel`` ends them.

``action=array`` submits a whole run as three jobs that need no driver and no network between nodes: preparation and
seed; an array with one training per element; and, when all of them have succeeded, the rest of ``btm run``. With
``dry_run=true`` it prints the lines instead.
"""

import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from btm.config import Config
from btm.config_launch import ExecutorName, SlurmAction
from btm.errors import RunError
from btm.plan_steps import Step, StepKind
from btm.session import (
    check_writable,
    console_for,
    domain_groups,
    make_context,
    plan_input,
    slurm_options,
    slurm_state_dir,
)
from btm.steps import MODULES
from btm.tables import rows_table
from btm.verbs.step import trainings
from launch import slurm_commands
from launch.process import added_import_path
from launch.slurm_commands import QueuedJob, SlurmError
from launch.slurm_executor import submission_text
from launch.slurm_options import job_environment, placement_options, shown, size_options
from launch.slurm_status import job_name
from launch.task import Task

_SCRIPTS = Path(__file__).resolve().parent.parent.parent / "slurm"
_OWN_KEYS = ("action", "dry_run", "steps", "element")


def main(config: Config) -> None:
    """Do what ``action=`` says.

    Raises:
        RunError: If Slurm refuses, or a job that was followed failed.
    """
    try:
        if config.action is SlurmAction.array:
            _submit_array(config)
        elif config.action is SlurmAction.cancel:
            _cancel(config)
        elif config.action is SlurmAction.follow:
            _follow(config)
        else:
            _print_jobs(config, jobs_of(config))
    except SlurmError as error:
        raise RunError(str(error)) from None


def jobs_of(config: Config) -> list[QueuedJob]:
    """Jobs in the queue that belong to the forest."""
    mark = job_name("", slurm_state_dir(config))
    return sorted((job for job in slurm_commands.queue().values() if mark in job.name), key=lambda job: job.job_id)


def submission_lines(steps: Sequence[Step], config: Config) -> list[str]:
    """The ``sbatch`` line of every step that ``launch=slurm`` submits, in the order of the plan."""
    domains, novel, later = domain_groups(config)
    context, options = make_context(config, domains, [*novel, *later]), slurm_options(config)
    return [
        submission_text(
            Task(
                name=step.name,
                module=MODULES[step.kind],
                log_path=context.log(step.name),
                num_processes=step.num_processes,
                num_cpus=step.num_cpus,
                num_gpus=step.num_gpus,
                num_nodes=step.num_nodes,
            ),
            options,
            slurm_state_dir(config),
        )
        for step in steps
        if step.kind is not StepKind.joining
    ]


def _print_jobs(config: Config, jobs: Sequence[QueuedJob]) -> None:
    rows = [(job.job_id, _step_of(job), job.state, job.node or job.reason) for job in jobs]
    console_for(config).print(rows_table(("job", "step", "state", "where, or why not yet"), rows))


def _cancel(config: Config) -> None:
    jobs = jobs_of(config)
    slurm_commands.cancel([job.job_id for job in jobs])
    console_for(config).print(f"cancelled {len(jobs)} jobs of {config.forest}; their checkpoints stay")


def _follow(config: Config) -> None:
    """Print every change until no job is left.

    Raises:
        RunError: Naming the jobs that did not end well.
    """
    seen: dict[int, str] = {}
    names: dict[int, str] = {}
    failed: list[str] = []
    while True:
        jobs = {job.job_id: job for job in jobs_of(config)}
        for job_id, job in jobs.items():
            names[job_id] = _step_of(job)
            where = f"{job.state} {job.node or job.reason}"
            if seen.get(job_id) != where:
                _say(f"job {job_id} {names[job_id]}: {where}")
            seen[job_id] = where
        for job_id in [job_id for job_id in seen if job_id not in jobs]:
            del seen[job_id]
            ended = slurm_commands.ended_job(job_id)
            how = ended.state if ended else "left the queue"
            _say(f"job {job_id} {names[job_id]}: {how}")
            if ended and ended.state != "COMPLETED":
                failed.append(f"{names[job_id]} (job {job_id}) ended as {how}")
        if not jobs:
            break
        time.sleep(config.launch.slurm.poll_s)
    if failed:
        raise RunError("; ".join(failed))


def _submit_array(config: Config) -> None:
    """Submit preparation and seed, the array, and the rest; each waits for the one before."""
    overrides = _own_overrides()
    if config.dry_run:
        for command in array_commands(config, overrides, ("FIRST", "ARRAY")):
            _say(shown(command))
        return
    state_dir = slurm_state_dir(config)
    check_writable(Path(config.forest))
    state_dir.mkdir(parents=True, exist_ok=True)
    environment = job_environment(os.environ, import_path=added_import_path(sys.path)) | {"BTM_PYTHON": sys.executable}
    job_ids: list[str] = []
    for index in range(3):
        command = array_commands(config, overrides, tuple(job_ids))[index]
        job_ids.append(str(slurm_commands.submit(command, environment)))
        _say(f"job {job_ids[-1]}: {shown(command)}")


def array_commands(config: Config, overrides: Sequence[str], job_ids: Sequence[str]) -> list[list[str]]:
    """The three ``sbatch`` lines of an array run.

    Args:
        config: The run.
        overrides: What the user typed for it.
        job_ids: Those of the first and of the second job, as far as they are known.
    """
    launch = config.launch.model_copy(update={"executor": ExecutorName.slurm})
    config = config.model_copy(update={"launch": launch})
    domains, novel, later = domain_groups(config)
    given = plan_input(config, domains, [*novel, *later])
    elements, whole = trainings(given), given.machine
    alone_size = size_options(1, whole.cpus_per_node, whole.num_gpus // whole.num_nodes)
    at_once = f"%{launch.num_groups}" if launch.num_groups else ""
    first, array = (*job_ids, "", "")[:2]
    largest = max(elements, key=lambda step: (step.num_gpus, step.num_cpus))
    one = size_options(largest.num_nodes, largest.num_cpus, largest.num_gpus)
    first_size = size_options(whole.num_nodes, whole.num_cpus, whole.num_gpus)
    alone, many = str(_SCRIPTS / "btm.sbatch"), str(_SCRIPTS / "array.sbatch")
    span = f"--array=0-{len(elements) - 1}{at_once}"
    in_array, here = [*overrides, "launch.executor=slurm"], [*overrides, "launch.executor=local"]
    return [
        [*_head(config, "first", first_size, "%j"), alone, "step", "steps=[prepare,seed]", *in_array],
        [*_head(config, "array", one, "%A-%a"), span, *_only_after(first), many, *in_array],
        [*_head(config, "rest", alone_size, "%j"), *_only_after(array), alone, "run", *here],
    ]


def _head(config: Config, name: str, size: Sequence[str], log: str) -> list[str]:
    state_dir = slurm_state_dir(config)
    return [
        "sbatch",
        "--parsable",
        f"--job-name={job_name(name, state_dir)}",
        *size,
        f"--output={str(state_dir.absolute()).replace('%', '%%')}/{name}-{log}.log",
        f"--signal=TERM@{config.launch.slurm.grace_s}",
        *placement_options(slurm_options(config)),
    ]


def _only_after(job_id: str) -> list[str]:
    # Without the second, a job whose predecessor failed would wait for ever.
    return [f"--dependency=afterok:{job_id}", "--kill-on-invalid-dep=yes"]


def _own_overrides() -> list[str]:
    from hydra.core.hydra_config import HydraConfig

    typed = [override.lstrip("+") for override in HydraConfig.get().overrides.task]
    return [override for override in typed if override.partition("=")[0] not in _OWN_KEYS]


def _step_of(job: QueuedJob) -> str:
    return job.name.rpartition(".")[0]


def _say(line: str) -> None:
    print(line, flush=True)
