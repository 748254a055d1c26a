import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launch.resources import (
    CoreLeases,
    ResourcePool,
    available_cores,
    available_gpus,
    available_memory_bytes,
    cpu_quota,
    nodes_problem,
    private_dir,
    visible_gpus,
)


@pytest.mark.parametrize(
    ("text", "cores"),
    [
        ("max 100000\n", None),
        ("200000 100000\n", 2),
        ("50000 100000", 1),
        ("250000 100000", 2),
        ("", None),
        ("x y", None),
    ],
)
def test_cpu_quota(text, cores):
    assert cpu_quota(text) == cores


@pytest.mark.parametrize(
    ("value", "ids"),
    [("", ()), ("0,2", ("0", "2")), ("-1", ()), ("1,-1,2", ("1",)), ("GPU-ab, MIG-c", ("GPU-ab", "MIG-c"))],
)
def test_visible_gpus(value, ids):
    assert visible_gpus(value) == ids
    assert available_gpus({"CUDA_VISIBLE_DEVICES": value}) == ids


def test_this_machine_has_cores_and_memory():
    assert len(available_cores()) >= 1
    assert 0 < available_memory_bytes() < 1 << 50


def test_gpus_are_listed_without_torch():
    code = "import sys; from launch.resources import available_gpus; available_gpus({}); print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(1, 4), st.integers(0, 2), st.booleans()), max_size=30))
def test_no_core_or_gpu_is_ever_given_twice(requests):
    pool = ResourcePool(range(6), ("a", "b", "c"), num_groups=4)
    given_now = []
    for num_cpus, num_gpus, is_return in requests:
        if is_return and given_now:
            pool.release(given_now.pop(0))
        allocation = pool.acquire(num_cpus, num_gpus)
        if allocation:
            given_now.append(allocation)
            assert (len(allocation.cores), len(allocation.gpus)) == (num_cpus, num_gpus)
        for values in ([a.cores for a in given_now], [a.gpus for a in given_now]):
            flat = [value for one in values for value in one]
            assert len(flat) == len(set(flat))
        assert len(given_now) <= 4


def test_leases_avoid_the_own_group_first_and_then_everybody(tmp_path):
    one, two = CoreLeases("one", tmp_path), CoreLeases("two", tmp_path)
    assert one.take((0, 1, 2), 2) == (0, 1)
    assert two.take((0, 1, 2), 1) == (2,)
    again, three = CoreLeases("two", tmp_path), CoreLeases("three", tmp_path)
    assert again.take((2, 0), 1) == (0,)  # as many claims as core 2, but none of its own group
    assert three.take((0, 1), 1) == (1,)
    for leases in (one, two, again, three):
        leases.release((0, 1, 2))
    assert list(tmp_path.glob("core-*")) == []


def test_the_claims_of_a_dead_process_are_void(tmp_path):
    code = "import sys, pathlib, launch.resources as r; r.CoreLeases('x', pathlib.Path(sys.argv[1])).take((0,), 1)"
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
    assert len(list(tmp_path.glob("core-0.x.*"))) == 1
    assert CoreLeases("y", tmp_path).take((0, 1), 1) == (0,)
    assert len(list(tmp_path.glob("core-0.x.*"))) == 0


def test_leases_without_a_usable_directory_change_nothing(tmp_path):
    leases = CoreLeases("x", tmp_path / "missing")
    assert leases.take((3, 4), 1) == (3,)
    leases.release((3,))


def test_the_private_directory_is_private_and_a_taken_name_is_not_used(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    directory = private_dir()
    assert directory.stat().st_mode & 0o777 == 0o700
    directory.rmdir()
    (tmp_path / "elsewhere").mkdir()
    directory.symlink_to(tmp_path / "elsewhere")
    other = private_dir()
    assert other != directory
    assert other.stat().st_mode & 0o777 == 0o700


def test_a_task_too_large_for_every_node_is_named_with_what_the_nodes_have():
    nodes = [{"CPU": 8.0}, {"CPU": 4.0, "GPU": 2.0}]
    assert nodes_problem(nodes, 4, 2) is None
    problem = nodes_problem(nodes, 8, 1)
    assert problem is not None
    assert "needs 8 CPUs and 1 GPUs on one node" in problem
    assert "8 CPUs, 0 GPUs; 4 CPUs, 2 GPUs" in problem
