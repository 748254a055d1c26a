"""What each of several nodes runs, and what becomes of the task; real ones are in tests/ray and tests/slurm."""

import multiprocessing
import os
import signal
import sys
import threading
from pathlib import Path

import pytest
from task_waiting import facts, program

from launch.nodes import Node, combined, ended_with_others, node_share
from launch.process import added_import_path, check_task, process_specs
from launch.resources import Allocation, nodes_problem
from launch.slurm_group import StopRequest, run_group
from launch.slurm_nodes import StepNode, follow, leading, own_node
from launch.slurm_options import SlurmOptions, job_request, size_options, task_of
from launch.task import State, Status, Task

GPUS = ("0", "1", "2", "3")


def task(**fields) -> Task:
    size = {"num_processes": 8, "num_cpus": 8, "num_gpus": 8, "num_nodes": 2}
    return Task(**{"name": "a", "module": "m", "log_path": Path("/r/log.txt"), **size, **fields})


def test_nodes_run_equal_shares_with_ranks_that_go_on_and_one_meeting_place():
    specs = []
    for rank in range(2):
        node = Node(rank=rank, count=2, address="10.0.0.7:29400")
        share, allocation = node_share(task(), rank), Allocation(cores=(0, 1, 2, 3), gpus=GPUS)
        env = {"MASTER_ADDR": "of the cluster", "RENDEZVOUS_FILE": "/of/an/outer/task", "A": "1"}
        specs += process_specs(share, allocation, env=env, working_dir="/w", rendezvous_file="/r", node=node)
    seen = [
        tuple(spec.env[name] for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")) for spec in specs
    ]
    assert seen == [(str(rank), str(rank % 4), "8", "4") for rank in range(8)]
    assert {(spec.env["MASTER_ADDR"], spec.env["MASTER_PORT"]) for spec in specs} == {("10.0.0.7", "29400")}
    assert not any("RENDEZVOUS_FILE" in spec.env for spec in specs)
    assert [spec.log_path for spec in specs] == ["/r/log.txt"] * 4 + ["/r/log.node1.txt"] * 4


def test_on_one_node_a_meeting_place_of_others_is_not_passed_on():
    share = node_share(task(num_nodes=1), 0)
    allocation = Allocation(cores=(0,), gpus=GPUS)
    env = {"MASTER_ADDR": "elsewhere", "MASTER_PORT": "1"}
    spec, *_ = process_specs(share, allocation, env=env, working_dir="/w", rendezvous_file="/r")
    assert spec.env["RENDEZVOUS_FILE"] == "/r"
    assert "MASTER_ADDR" not in spec.env
    assert share == task(num_nodes=1)


@pytest.mark.parametrize("field", ["num_processes", "num_cpus", "num_gpus"])
def test_a_task_that_nodes_cannot_share_out_is_refused(field):
    with pytest.raises(ValueError, match=rf"{field} of task 'a' must be a multiple of its num_nodes \(2\), got 7"):
        check_task(task(**{field: 7}))


def test_the_cause_of_a_failure_is_named_and_not_its_consequence():
    well = Status(name="a", state=State.succeeded, exit_code=0)
    lost = Status(name="a", state=State.failed, exit_code=75)
    killed = Status(name="a", state=State.failed, exit_code=-9)
    gone = Status(name="a", state=State.failed)
    stopped = Status(name="a", state=State.cancelled)
    assert combined([well, well]) is well
    assert combined([lost, killed]) is killed
    assert combined([ended_with_others("a"), gone]) is gone
    assert combined([well, lost]) is lost
    assert combined([killed, stopped]) is stopped


def test_a_cluster_needs_as_many_fitting_nodes():
    nodes = [{"CPU": 8.0, "GPU": 4.0}, {"CPU": 8.0, "GPU": 2.0}]
    assert nodes_problem(nodes, 4, 2, 2) is None
    assert "4 CPUs and 4 GPUs on each of 2 nodes" in (nodes_problem(nodes, 4, 4, 2) or "")


def test_a_process_of_a_job_step_knows_its_node():
    step = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_NODEID": "1", "SLURM_STEP_NUM_NODES": "2"}
    node = own_node(step)
    assert (node.rank, node.count) == (1, 2)
    assert own_node(step | {"SLURM_RESTART_COUNT": "1"}).name != node.name
    alone = own_node({"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "2", "SLURM_NODEID": "0"})  # a batch script
    assert (alone.rank, alone.count) == (0, 1)


def test_slurm_is_asked_for_nodes_and_the_share_of_each():
    assert size_options(2, 8, 8) == ["--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=4", "--gres=gpu:4"]
    assert size_options(1, 3, 0) == ["--nodes=1", "--ntasks-per-node=1", "--cpus-per-task=3"]
    request = job_request(task(), SlurmOptions(), outcome_dir=Path("/o"))
    assert task_of(request) == task(arguments=[])


@pytest.fixture
def import_path(monkeypatch):
    """Lets fresh interpreters find the programs of these tests."""
    monkeypatch.setenv("PYTHONPATH", added_import_path(sys.path))


def agent(folder: Path, rank: int, name: str = "7.0.0") -> multiprocessing.Process:
    def follow_first() -> None:
        with (stop := StopRequest()).installed():
            follow(folder / "meetings", StepNode(rank, 2, name), stop)

    process = multiprocessing.get_context("fork").Process(target=follow_first)
    process.start()
    return process


def test_agents_meet_by_files_attempt_by_attempt_and_leave_in_order(tmp_path, import_path):
    """Both agents on this machine: what a Slurm step starts on two nodes."""
    other = agent(tmp_path, 1)
    size = {"num_processes": 2, "num_cpus": 2, "num_nodes": 2}
    stop = StopRequest()
    with stop.installed(), leading(tmp_path / "meetings", StepNode(0, 2, "7.0.0")) as leader:
        failed = leader.run(program(tmp_path, "half", "exit by rank", "0", "7", **size), stop, stop_s=5.0)
        well = leader.run(program(tmp_path, "both", "note by rank", str(tmp_path / "rank"), **size), stop, stop_s=5.0)
        alone = leader.run(program(tmp_path, "alone", "note", str(tmp_path / "alone")), stop, stop_s=5.0)
        with pytest.raises(ValueError, match="runs on 3 nodes, this job step has 2; submit it with sbatch --nodes=3"):
            leader.run(task(num_nodes=3, num_processes=9, num_cpus=9, num_gpus=0), stop, stop_s=5.0)
    other.join(20)
    assert other.exitcode == 0
    assert (failed.state, failed.exit_code) == (State.failed, 7)
    assert failed.reason.startswith("process 1 of 2, on node 1 of 2,")
    assert (well.state, alone.state) == (State.succeeded, State.succeeded)
    seen = [facts(tmp_path / f"rank{rank}") for rank in range(2)]
    assert [(one["rank"], one["local_rank"], one["world_size"]) for one in seen] == [("0", "0", "2"), ("1", "0", "2")]


def test_a_task_of_one_core_leaves_the_next_one_all_the_cores(tmp_path, import_path):
    before = os.sched_getaffinity(0)
    run_group(program(tmp_path, "one", "note", str(tmp_path / "one"), num_cpus=1), StopRequest(), stop_s=5.0)
    assert len(facts(tmp_path / "one")["cores"]) == 1
    assert os.sched_getaffinity(0) == before


def test_a_stop_that_only_one_node_hears_of_stops_the_task(tmp_path, import_path):
    other = agent(tmp_path, 1)
    stop = StopRequest()
    size = {"num_processes": 2, "num_cpus": 2, "num_nodes": 2}

    def stop_the_other() -> None:
        facts(tmp_path / "rank1")
        os.kill(other.pid or 0, signal.SIGTERM)

    messenger = threading.Thread(target=stop_the_other)
    messenger.start()
    waiting = program(tmp_path, "long", "sleep by rank", str(tmp_path / "rank"), "100", **size)
    with stop.installed(), leading(tmp_path / "meetings", StepNode(0, 2, "7.0.0")) as leader:
        status = leader.run(waiting, stop, stop_s=5.0)
    messenger.join()
    other.join(20)
    assert status.state is State.cancelled
    assert other.exitcode == 0
