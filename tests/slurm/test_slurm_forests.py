"""Forests on a real Slurm: whatever happens to jobs and nodes, the forest ends complete, with the same bits."""

import json
import signal
import sys
from pathlib import Path

import pytest
from slurm_cluster import until
from slurm_runs import (
    ELM,
    checkpoints,
    elm_hashes,
    first_updates,
    held,
    start_btm,
    stopped_updates,
    wait_for_checkpoint,
    wait_until_told,
)

from tests.conftest import run_btm

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
ROOT = Path(__file__).resolve().parents[2]


def begin_array(cluster, forest: Path, *options: str) -> int:
    """Train both ELMs as an array on the seeded forest."""
    script, output = str(ROOT / "slurm" / "array.sbatch"), f"--output={forest.parent}/array-%a.log"
    env = {"BTM_PYTHON": sys.executable}
    return cluster.sbatch("--array=0-1", "--cpus-per-task=1", output, *options, script, f"forest={forest}", env=env)


def wait_for_array(cluster, job: int, *, timeout_s: float = 300.0) -> None:
    for element in range(2):
        cluster.wait_for(f"{job}_{element}", "COMPLETED", timeout_s=timeout_s)


def finish(forest: Path, arguments: tuple[str, ...]) -> dict[str, str]:
    run_btm("run", *arguments, f"forest={forest}", cwd=forest.parent)
    return elm_hashes(forest)


def test_an_array_of_three_jobs_makes_the_same_forest_as_one_machine(cluster, tmp_path, arguments, reference):
    forest = tmp_path / "forest"
    options = (f"forest={forest}", "launch.slurm.time_s=600")
    run_btm("slurm", "action=array", *arguments, *options, cwd=tmp_path)
    listed = run_btm("slurm", f"forest={forest}", cwd=tmp_path).stdout
    assert [word in listed for word in ("first", "array", "rest")] == [True, True, True]
    done = start_btm("slurm", "action=follow", f"forest={forest}", "launch.slurm.poll_s=1", cwd=tmp_path)
    assert done.wait(600) == 0, done.stdout and done.stdout.read()
    assert elm_hashes(forest) == reference


def test_a_failed_job_keeps_those_behind_it_from_going_on_short(cluster, tmp_path, arguments):
    forest = tmp_path / "forest"
    broken = [item for item in arguments if "domains.docs" not in item]
    (tmp_path / "short.jsonl").write_text(json.dumps({"text": "too short"}) + "\n")
    overrides = (*broken, f"data.domains.docs={tmp_path}/short.jsonl", f"forest={forest}")
    run_btm("slurm", "action=array", *overrides, cwd=tmp_path)
    done = start_btm("slurm", "action=follow", f"forest={forest}", "launch.slurm.poll_s=1", cwd=tmp_path)
    output = done.communicate(timeout=300)[0]
    assert done.returncode == 1
    assert "first" in output
    assert "FAILED" in output
    assert "rest" in output
    assert "CANCELLED" in output
    assert not (forest / "evaluation.json").exists()


def test_preempted_elements_write_a_checkpoint_and_continue(cluster, forest, arguments, reference):
    job = begin_array(cluster, forest, "--partition=low")
    until(lambda: checkpoints(forest) and checkpoints(forest, "elm/docs"), timeout_s=120)
    urgent = cluster.sbatch("-phigh", "-N2", "--exclusive", "--output=/dev/null", "--wrap", "sleep 2")
    cluster.wait_for(urgent, "COMPLETED")
    wait_for_array(cluster, job)
    for step in (ELM, "elm/docs"):
        assert len(stopped_updates(forest, step)) == 1
        assert first_updates(forest, step)[1] == stopped_updates(forest, step)[0] + 1
    assert finish(forest, arguments) == reference


def test_the_last_checkpoint_is_written_before_the_limit(cluster, forest, arguments, reference):
    job = begin_array(cluster, forest, "--signal=TERM@60")
    with held(forest) as pids:
        cluster.limit(f"{job}_0", minutes_more=1)
        wait_until_told(pids)
        cluster.limit(f"{job}_0", minutes_more=20)
    wait_for_array(cluster, job, timeout_s=500)
    assert len(stopped_updates(forest)) == 1
    assert first_updates(forest)[1:] == [update + 1 for update in stopped_updates(forest)]
    assert finish(forest, arguments) == reference


def test_elements_on_a_dead_node_run_again(cluster, forest, arguments, reference):
    job = begin_array(cluster, forest, "--exclusive")
    until(lambda: checkpoints(forest), timeout_s=120)
    node = cluster.field(f"{job}_0", "NodeList")
    cluster.kill_node(node)
    try:
        wait_for_array(cluster, job)
    finally:
        cluster.start_node(node)
        until(lambda: cluster.idle_nodes() == 2, timeout_s=60)
    assert len(first_updates(forest)) == 2
    assert first_updates(forest)[1] > 50
    assert finish(forest, arguments) == reference


def test_a_driver_that_is_told_of_a_cancelled_job_finishes_the_others(cluster, forest, arguments, reference):
    options = (*arguments, f"forest={forest}", "launch=slurm", "launch.slurm.poll_s=0.5")
    driver = start_btm("run", *options, cwd=forest.parent)
    wait_for_checkpoint(driver, forest)
    victim = next(job for job, name in cluster.jobs().items() if name.startswith("elm/code."))
    cluster.command("scancel", str(victim))
    output = driver.communicate(timeout=300)[0]
    assert driver.returncode == 1, output
    assert "elm/code failed" in output
    assert "cancelled" in output
    from btm.forest import Forest

    assert Forest.open(forest).domains == ["docs"]
    assert len(stopped_updates(forest)) == 1
    driver = start_btm("run", *options, cwd=forest.parent)
    output = driver.communicate(timeout=400)[0]
    assert driver.returncode == 0, output
    assert elm_hashes(forest) == reference
    assert first_updates(forest)[1] == stopped_updates(forest)[0] + 1


def test_a_driver_that_is_asked_to_stop_ends_its_jobs(cluster, forest, arguments):
    driver = start_btm("run", *arguments, f"forest={forest}", "launch=slurm", cwd=forest.parent)
    wait_for_checkpoint(driver, forest)
    driver.send_signal(signal.SIGTERM)
    output = driver.communicate(timeout=100)[0]
    assert driver.returncode == 130, output
    assert not cluster.jobs()
    assert len(stopped_updates(forest)) == 1
