"""Tasks and ELMs on two nodes of a real Slurm, each with a network of its own."""

import json
import shutil
import sys
from pathlib import Path

import pytest
from slurm_cluster import until
from slurm_runs import checkpoints, elm_hashes, first_updates, start_btm, stopped_updates, wait_for_checkpoint
from task_waiting import facts, finish, program

from launch.slurm_executor import SlurmExecutor
from launch.task import State
from tests.conftest import run_btm

pytestmark = [pytest.mark.slow, pytest.mark.distributed, pytest.mark.timeout(900)]
ROOT = Path(__file__).resolve().parents[2]
TWO_PROCESSES = ("engine.num_processes=2", "launch.cpus_per_elm=2")
TWO_NODES = (*TWO_PROCESSES, "launch.nodes_per_elm=2")


@pytest.fixture(scope="module")
def one_domain(arguments) -> tuple[str, ...]:
    return tuple(item for item in arguments if "domains.docs" not in item)


@pytest.fixture(scope="module")
def on_one_machine(tmp_path_factory, one_domain) -> Path:
    """A forest of one ELM that two processes of one machine trained."""
    forest = tmp_path_factory.mktemp("one") / "forest"
    run_btm("run", *one_domain, *TWO_PROCESSES, f"forest={forest}", cwd=forest.parent)
    return forest


@pytest.fixture
def untrained(tmp_path, on_one_machine) -> Path:
    """A copy of it, with corpus and seed but without the ELM."""
    forest = tmp_path / "forest"
    shutil.copytree(on_one_machine, forest)
    for name in ("runs/elm", "runs/score", "runs/average", "runs/evaluate", "elms/code", "scores"):
        shutil.rmtree(forest / name, ignore_errors=True)
    manifest = json.loads((forest / "forest.json").read_text())
    manifest["elms"] = []
    (forest / "forest.json").write_text(json.dumps(manifest))
    return forest


def test_the_processes_of_a_task_meet_on_two_nodes(cluster, tmp_path):
    with SlurmExecutor(tmp_path / "state", poll_s=0.5) as executor:
        size = {"num_processes": 2, "num_cpus": 2, "num_nodes": 2}
        executor.submit(program(tmp_path, "meet", "gloo", **size))
        executor.submit(program(tmp_path, "where", "note by rank", str(tmp_path / "rank"), **size))
        executor.submit(program(tmp_path, "half", "one fails", str(tmp_path / "half"), **size))
        executor.submit(program(tmp_path, "killed", "last is killed", str(tmp_path / "killed"), **size))
        statuses = finish(executor, timeout_s=200)
    assert statuses["meet"].state is State.succeeded, (tmp_path / "meet.log").read_text()
    assert "sum 3" in (tmp_path / "meet.log").read_text()
    assert "sum 3" in (tmp_path / "meet.node1.log").read_text()
    seen = [facts(tmp_path / f"rank{rank}") for rank in range(2)]
    assert [(one["rank"], one["local_rank"], one["world_size"]) for one in seen] == [("0", "0", "2"), ("1", "0", "2")]
    assert sorted(one["host"] for one in seen) == cluster.nodes
    assert (statuses["half"].state, statuses["half"].exit_code) == (State.failed, 7)
    assert "process 1 of 2, on node 1 of 2" in statuses["half"].reason
    assert (statuses["killed"].state, statuses["killed"].exit_code) == (State.failed, -9)
    assert "on node 1 of 2" in statuses["killed"].reason


def test_an_elm_on_two_nodes_equals_that_of_one_machine(cluster, untrained, on_one_machine, one_domain):
    options = (*one_domain, *TWO_NODES, f"forest={untrained}", "launch=slurm", "launch.slurm.poll_s=0.5")
    driver = start_btm("run", *options, cwd=untrained.parent)
    output = driver.communicate(timeout=400)[0]
    assert driver.returncode == 0, output
    assert (untrained / "runs/elm/code/log.node1.txt").is_file()
    assert elm_hashes(untrained) == elm_hashes(on_one_machine)


def test_an_element_on_two_nodes_is_preempted_and_continues(cluster, untrained, on_one_machine, one_domain):
    script, output = str(ROOT / "slurm" / "array.sbatch"), f"--output={untrained.parent}/array-%a.log"
    options = ("--nodes=2", "--cpus-per-task=1", "--partition=low", "--array=0-0", output)
    arguments = (f"forest={untrained}", *TWO_NODES)
    job = cluster.sbatch(*options, script, *arguments, env={"BTM_PYTHON": sys.executable})
    until(lambda: checkpoints(untrained), timeout_s=180, what=lambda: cluster.state(job))
    urgent = cluster.sbatch("-phigh", "-N2", "--exclusive", "--output=/dev/null", "--wrap", "true")
    cluster.wait_for(urgent, "COMPLETED")
    cluster.wait_for(f"{job}_0", "COMPLETED", timeout_s=300)
    assert first_updates(untrained)[1:] == [update + 1 for update in stopped_updates(untrained)]
    assert len(stopped_updates(untrained)) == 1
    # What is left to do needs one node.
    run_btm("run", *one_domain, *TWO_NODES, f"forest={untrained}", cwd=untrained.parent)
    assert elm_hashes(untrained) == elm_hashes(on_one_machine)


@pytest.mark.parametrize("which", [0, 1])
def test_an_elm_outlives_one_of_its_two_nodes(cluster, untrained, on_one_machine, one_domain, which):
    options = (*one_domain, *TWO_NODES, f"forest={untrained}", "launch=slurm", "launch.slurm.poll_s=0.5")
    driver = start_btm("run", *options, cwd=untrained.parent)
    wait_for_checkpoint(driver, untrained)
    node = cluster.nodes[which]
    cluster.kill_node(node)
    until(lambda: cluster.node_state(node).startswith("DOWN"), timeout_s=120, what=lambda: cluster.node_state(node))
    cluster.start_node(node)
    output = driver.communicate(timeout=400)[0]
    assert driver.returncode == 0, output
    assert len(first_updates(untrained)) == 2
    assert first_updates(untrained)[1] > 50
    assert elm_hashes(untrained) == elm_hashes(on_one_machine)
