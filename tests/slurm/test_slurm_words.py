"""What is said to Slurm and what its answers mean; no Slurm is needed."""

import os
import subprocess
from pathlib import Path

import pytest

from launch import slurm_commands
from launch.slurm_commands import BusyError, EndedJob, SlurmError
from launch.slurm_options import (
    SlurmOptions,
    fingerprint,
    job_environment,
    job_request,
    options_problems,
    sbatch_command,
    task_of,
)
from launch.slurm_status import job_name, status_of_ended, status_of_outcome
from launch.task import State, Task

ROOT = Path(__file__).resolve().parents[2]


def task(**fields) -> Task:
    given = {"name": "elm/law", "module": "m", "log_path": Path("/r/log 100%.txt"), "arguments": ("a b",), **fields}
    return Task(**given)


def line(options: SlurmOptions, **fields) -> list[str]:
    return sbatch_command(
        task(**fields), options, job_name="n", request_path=Path("/r/q.json"), python="/p", working_dir="/w dir"
    )


def test_the_line_holds_what_the_task_and_the_options_say():
    options = SlurmOptions(partition="p", account="a", qos="q", time_s=3601, grace_s=90, more=("--mem=4G",))
    assert line(options, num_cpus=3, num_gpus=2) == [
        "sbatch",
        "--parsable",
        "--job-name=n",
        "--nodes=1",
        "--ntasks-per-node=1",
        "--cpus-per-task=3",
        "--gres=gpu:2",
        "--output=/r/log 100%%.txt",
        "--open-mode=append",
        "--chdir=/w dir",
        "--export=ALL",
        "--requeue",
        "--signal=TERM@90",
        "--partition=p",
        "--account=a",
        "--qos=q",
        "--time=61",
        "--mem=4G",
        str(ROOT / "slurm" / "task.sbatch"),
        "/p",
        "/r/q.json",
    ]
    assert not any(part.startswith(("--gres", "--partition", "--time")) for part in line(SlurmOptions()))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (SlurmOptions(more=("-N2",)), "'-N2' is not an option"),
        (SlurmOptions(more=("--nodes=2",)), "--nodes follows from the task"),
        (SlurmOptions(time_s=100, grace_s=120), "100 s leaves nothing beside the 120 s"),
    ],
)
def test_options_that_contradict_the_task_are_refused(options, words):
    assert words in options_problems(options)[0]


def test_a_request_comes_back_as_the_task_that_it_was():
    given = task(env={"A": "1"}, num_processes=2)
    request = job_request(given, SlurmOptions(), outcome_dir=Path("/o"))
    assert task_of(request) == task(env={"A": "1"}, num_processes=2, arguments=["a b"])


def test_the_fingerprint_sees_the_content_of_files_that_are_named(tmp_path):
    (tmp_path / "spec.json").write_text("1")
    named = task(arguments=(str(tmp_path / "spec.json"),))
    before = fingerprint(named)
    assert fingerprint(named) == before
    (tmp_path / "spec.json").write_text("2")
    assert fingerprint(named) != before


def test_secrets_and_the_words_of_an_enclosing_job_do_not_reach_the_new_one():
    given = {
        "PATH": "/bin",
        "WANDB_API_KEY": "x",
        "HF_TOKEN": "x",
        "AWS_SECRET_ACCESS_KEY": "x",
        "DB_PASSWORD": "x",
        "TOKENIZERS_PARALLELISM": "false",
        "RAY_AUTH_TOKEN_PATH": "/t",
        "SLURM_CONF": "/c",
        "SLURM_JOB_ID": "7",
        "SLURM_CPU_BIND": "none",
    }
    kept = job_environment(given, import_path="/i")
    assert set(kept) == {"PATH", "TOKENIZERS_PARALLELISM", "RAY_AUTH_TOKEN_PATH", "SLURM_CONF", "PYTHONPATH"}


@pytest.mark.parametrize(
    ("ended", "state", "exit_code", "words"),
    [
        (EndedJob(state="COMPLETED", exit_code=0, signal=0), State.succeeded, 0, ""),
        (EndedJob(state="COMPLETED", exit_code=3, signal=0), State.failed, None, "COMPLETED 3:0"),
        (EndedJob(state="FAILED", exit_code=2, signal=0), State.failed, 2, "FAILED 2:0"),
        (EndedJob(state="FAILED", exit_code=0, signal=9), State.failed, -9, "FAILED 0:9"),
        (EndedJob(state="TIMEOUT", exit_code=0, signal=1), State.failed, None, "launch.slurm.time_s"),
        (EndedJob(state="OUT_OF_MEMORY", exit_code=0, signal=125), State.failed, None, "--mem"),
        (EndedJob(state="NODE_FAIL", exit_code=0, signal=0, node="n7"), State.failed, None, "on n7 as NODE_FAIL"),
        (EndedJob(state="CANCELLED", exit_code=0, signal=15), State.failed, 1, "somebody cancelled it"),
    ],
)
def test_how_a_job_ended_says_how_the_task_did(ended, state, exit_code, words):
    status = status_of_ended("a", 5, ended)
    assert (status.state, status.exit_code) == (state, exit_code)
    assert words in status.reason


def test_only_final_words_of_a_job_decide():
    for words in ({}, {"state": "requeued"}, {"state": "stopped"}):
        assert status_of_outcome("a", words) is None
    failed = status_of_outcome("a", {"state": "failed", "exit_code": -9, "reason": "it was killed", "node": "n1"})
    assert failed is not None
    assert (failed.state, failed.exit_code, failed.reason) == (State.failed, -9, "it was killed (on n1)")


def test_two_runs_give_their_jobs_different_names():
    assert job_name("elm/law", Path("/a")) != job_name("elm/law", Path("/b"))
    assert job_name("elm/law", Path("/a")).startswith("elm/law.")


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("slurm_load_jobs error: Unable to contact slurm controller (connect failure)", BusyError),
        ("sbatch: error: Batch job submission failed: Socket timed out on send/recv operation", BusyError),
        ("sbatch: error: QOSMaxSubmitJobPerUserLimit", BusyError),
        ("sbatch: error: invalid partition specified: nope", SlurmError),
        ("sbatch: error: Batch job submission failed: Requested node configuration is not available", SlurmError),
    ],
)
def test_errors_that_pass_are_told_from_those_that_stay(tmp_path, monkeypatch, text, kind):
    program = tmp_path / "sbatch"
    program.write_text(f"#!/bin/sh\necho '{text}' >&2\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(SlurmError) as caught:
        slurm_commands.submit(["sbatch"])
    assert type(caught.value) is kind
    assert text.split(": ")[-1] in str(caught.value)


def test_the_scripts_are_clean():
    scripts = sorted(str(path) for path in (ROOT / "slurm").glob("*.sbatch"))
    assert len(scripts) >= 4
    for script in scripts:
        assert subprocess.run(["bash", "-n", script], check=False).returncode == 0


def test_shellcheck_finds_nothing():
    scripts = sorted(str(path) for path in (ROOT / "slurm").glob("*.sbatch"))
    try:
        done = subprocess.run(["shellcheck", *scripts], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("shellcheck is not installed")
    assert done.returncode == 0, done.stdout
