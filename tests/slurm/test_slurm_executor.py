"""Tasks as jobs of a real Slurm."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from slurm_cluster import until
from task_waiting import facts, finish, program

from launch.slurm_executor import SlurmExecutor
from launch.slurm_files import StateDir
from launch.slurm_options import SlurmOptions
from launch.task import State, Task

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


@pytest.fixture
def executor(cluster, tmp_path):
    made = SlurmExecutor(tmp_path / "state", poll_s=0.5)
    yield made
    made.close()
    until(lambda: not cluster.jobs())


def counting(folder: Path, last: int, **fields) -> Task:
    arguments = (str(folder / "count"), str(last))
    return Task(name="count", module="slurm_task", arguments=arguments, log_path=folder / "count.log", **fields)


def reached(folder: Path) -> int:
    path = folder / "count"
    return int(path.read_text()) if path.exists() else 0


def poll_until(executor, condition, timeout_s=60.0):
    def look():
        executor.poll()
        return condition()

    return until(look, timeout_s=timeout_s, what=lambda: str(executor.poll()))


def test_tasks_end_as_their_processes_do(executor, tmp_path):
    executor.submit(program(tmp_path, "good", "note", str(tmp_path / "good"), env={"FLAG": "x"}))
    executor.submit(program(tmp_path, "bad", "exit", "3"))
    executor.submit(program(tmp_path, "killed", "signal", "9"))
    executor.submit(program(tmp_path, "ranks", "note by rank", str(tmp_path / "rank"), num_processes=2, num_cpus=2))
    executor.submit(program(tmp_path, "half", "one fails", str(tmp_path / "half"), num_processes=2))
    statuses = finish(executor, timeout_s=120)
    assert statuses["good"].state is State.succeeded
    assert (statuses["bad"].state, statuses["bad"].exit_code) == (State.failed, 3)
    assert (statuses["killed"].state, statuses["killed"].exit_code) == (State.failed, -9)
    assert "SIGKILL" in statuses["killed"].reason
    assert statuses["ranks"].state is State.succeeded
    assert (statuses["half"].exit_code, statuses["half"].reason[:18]) == (7, "process 1 of 2 exi")
    assert facts(tmp_path / "good")["flag"] == "x"
    seen = [facts(tmp_path / f"rank{rank}") for rank in range(2)]
    assert [(one["rank"], one["world_size"]) for one in seen] == [("0", "2"), ("1", "2")]
    assert seen[0]["rendezvous"] == seen[1]["rendezvous"]


def test_a_job_that_slurm_refuses_or_would_never_start_fails_at_once(cluster, tmp_path):
    with SlurmExecutor(tmp_path / "a", options=SlurmOptions(partition="nope"), poll_s=0.5) as executor:
        executor.submit(program(tmp_path, "refused", "exit", "0"))
        refused = finish(executor)["refused"]
    assert (refused.state, refused.exit_code) == (State.failed, 1)
    assert "nope" in refused.reason
    with SlurmExecutor(tmp_path / "b", options=SlurmOptions(time_s=7200), poll_s=0.5) as executor:
        executor.submit(program(tmp_path, "long", "exit", "0"))
        hopeless = finish(executor)["long"]
    assert (hopeless.state, hopeless.exit_code) == (State.failed, 1)
    assert "time limit" in hopeless.reason
    until(lambda: not cluster.jobs())


def test_secrets_of_the_driver_stay_with_it(executor, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "0123456789secret")
    code = "import os, sys; sys.exit(5 if 'WANDB_API_KEY' in os.environ else 0)"
    (tmp_path / "probe.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    executor.submit(Task(name="probe", module="probe", log_path=tmp_path / "probe.log"))
    assert finish(executor)["probe"].state is State.succeeded
    everything = [path.read_bytes() for path in (tmp_path / "state").rglob("*") if path.is_file()]
    assert everything
    assert not any(b"0123456789secret" in content for content in everything)


def test_cancel_ends_the_task_after_its_checkpoint(cluster, executor, tmp_path):
    executor.submit(counting(tmp_path, 100_000))
    poll_until(executor, lambda: reached(tmp_path) >= 10)
    executor.cancel("count")
    assert finish(executor)["count"].state is State.cancelled
    assert f"stops at {reached(tmp_path)}" in (tmp_path / "count.log").read_text()
    until(lambda: not cluster.jobs())


def test_a_job_that_somebody_cancels_is_not_started_again_by_itself(cluster, executor, tmp_path):
    executor.submit(counting(tmp_path, 100_000))
    poll_until(executor, lambda: reached(tmp_path) >= 10)
    cluster.command("scancel", *map(str, cluster.jobs()))
    status = finish(executor)["count"]
    assert (status.state, status.exit_code) == (State.failed, 1)
    assert "cancelled" in status.reason


def test_a_preempted_task_continues_where_it_was_and_counts_as_one(cluster, tmp_path):
    with SlurmExecutor(tmp_path / "state", options=SlurmOptions(partition="low"), poll_s=0.5) as executor:
        executor.submit(counting(tmp_path, 100, num_cpus=2))
        poll_until(executor, lambda: reached(tmp_path) >= 10)
        urgent = cluster.sbatch("-phigh", "-N2", "--exclusive", "--output=/dev/null", "--wrap", "sleep 2")
        assert finish(executor, timeout_s=120)["count"].state is State.succeeded
        cluster.wait_for(urgent, "COMPLETED")
    log = (tmp_path / "count.log").read_text().splitlines()
    begun = [line.split()[2] for line in log if line.startswith("begins at")]
    stopped = [line.split()[2] for line in log if line.startswith("stops at")]
    assert begun == ["0", *stopped]
    assert len(stopped) == 1
    assert StateDir(tmp_path / "state").outcomes.is_dir()


def test_a_job_on_a_dead_node_runs_again_on_another(cluster, tmp_path):
    with SlurmExecutor(tmp_path / "state", poll_s=0.5) as executor:
        executor.submit(counting(tmp_path, 150, num_cpus=2))
        poll_until(executor, lambda: reached(tmp_path) >= 10)
        job = next(iter(cluster.jobs()))
        node = cluster.field(job, "NodeList")
        cluster.kill_node(node)
        try:
            assert finish(executor, timeout_s=150)["count"].state is State.succeeded
            assert cluster.field(job, "NodeList") != node
            assert cluster.field(job, "Restarts") == "1"
        finally:
            cluster.start_node(node)
            until(lambda: cluster.idle_nodes() == 2, timeout_s=60)
    begun = [line for line in (tmp_path / "count.log").read_text().splitlines() if line.startswith("begins at")]
    assert len(begun) == 2
    assert begun[1] != "begins at 0 on 1"


def test_a_driver_that_was_killed_finds_its_jobs_again(cluster, tmp_path):
    script = (
        "import sys, time; sys.path[:0] = sys.argv[3:]\n"
        "from pathlib import Path\n"
        "from launch.slurm_executor import SlurmExecutor\n"
        "from launch.task import Task\n"
        "folder = Path(sys.argv[1])\n"
        "executor = SlurmExecutor(folder / 'state', poll_s=0.5)\n"
        "executor.submit(Task(name='count', module='slurm_task', log_path=folder / 'count.log',\n"
        "                     arguments=(str(folder / 'count'), sys.argv[2])))\n"
        "while True:\n    executor.poll(); time.sleep(0.1)\n"
    )
    paths = [path for path in sys.path if path.endswith("programs")]
    driver = subprocess.Popen([sys.executable, "-c", script, str(tmp_path), "60", *paths])
    until(lambda: reached(tmp_path) >= 10, timeout_s=60)
    os.kill(driver.pid, signal.SIGKILL)
    driver.wait()
    before = set(cluster.jobs())
    assert len(before) == 1
    with SlurmExecutor(tmp_path / "state", poll_s=0.5) as executor:
        executor.submit(counting(tmp_path, 60))
        assert finish(executor, timeout_s=60)["count"].state is State.succeeded
    assert set(cluster.jobs("--states=all")) >= before
    assert (tmp_path / "count.log").read_text().count("begins at") == 1
