import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from task_waiting import facts, finish, is_gone, program, until

from launch.ray_executor import RayExecutor
from launch.resources import available_cores
from launch.task import State

pytestmark = pytest.mark.ray

CLIENT = """
import sys
from pathlib import Path
from task_waiting import finish, program
from launch.ray_executor import RayExecutor

address, folder = sys.argv[1], Path(sys.argv[2])
with RayExecutor(address) as executor:
    executor.submit(program(folder, "guest", "note", str(folder / "guest")))
    print(finish(executor)["guest"].state.value)
"""


@pytest.fixture(scope="session")
def executor():
    with RayExecutor(num_cpus=2, grace_s=0.5) as made:
        yield made


def python(code, *arguments, timeout_s=150, **env):
    programs = str(Path(__file__).parent.parent / "launch" / "programs")
    # The driver's own connection must not leak into another program's environment.
    outer = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env={**outer, "PYTHONPATH": programs, **env},
        capture_output=True,
        text=True,
        timeout=timeout_s,
    )


def servers(executor):
    """Process ids of what makes up the cluster; its workers come and go."""
    found = {process.pid: process.name() for process in executor.session.processes()}
    return {pid for pid, name in found.items() if name in ("gcs_server", "raylet")}


def gcs_address():
    import ray

    return ray.get_runtime_context().gcs_address


def test_a_private_ray_is_closed_by_default(executor):
    session = executor.session
    assert session.directory.stat().st_mode & 0o777 == 0o700
    assert session.token_path.stat().st_mode & 0o777 == 0o600
    assert session.token_path.parent == session.directory
    assert os.environ["RAY_AUTH_MODE"] == "token"
    names = [" ".join(process.cmdline()) for process in session.processes()]
    assert any("gcs_server" in name for name in names)
    assert any("raylet" in name for name in names)
    listening = [
        connection.laddr
        for process in session.processes()
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    ]
    assert 8265 not in {address.port for address in listening}  # no dashboard


def test_more_tasks_than_groups_queue_in_order_on_disjoint_cores(executor, tmp_path):
    names = ["a", "b", "c", "d"]
    for name in names:
        arguments = (str(tmp_path / name), str(tmp_path / f"{name} may end"))
        executor.submit(program(tmp_path, name, "wait for", *arguments, env={"FLAG": name}))
    for name in names[:2]:
        facts(tmp_path / name, executor)
    assert not any((tmp_path / name).exists() for name in names[2:])
    for name, successor in zip(names[:2], names[2:], strict=True):
        assert executor.poll()[successor].state is State.queued
        (tmp_path / f"{name} may end").touch()
        facts(tmp_path / successor, executor)
    for name in names[2:]:
        (tmp_path / f"{name} may end").touch()
    assert {status.state for name, status in finish(executor).items() if name in names} == {State.succeeded}
    seen = [facts(tmp_path / name) for name in names]
    assert [one["flag"] for one in seen] == names
    assert all(one["ray"] == [] for one in seen)
    if len(available_cores()) >= 2:
        assert set(seen[0]["cores"]).isdisjoint(seen[1]["cores"])


def test_a_group_of_processes_meets_and_a_failing_one_ends_the_others(executor, tmp_path):
    executor.submit(program(tmp_path, "two", "one fails", str(tmp_path / "out"), num_processes=2, num_cpus=2))
    other = facts(tmp_path / "out", executor)
    status = finish(executor)["two"]
    assert (status.state, status.exit_code) == (State.failed, 7)
    assert other["world_size"] == "2"
    assert is_gone(other["pid"])


def test_a_killed_process_is_reported_with_its_signal_and_the_task_can_restart(executor, tmp_path):
    executor.submit(program(tmp_path, "killed", "tree", str(tmp_path / "killed")))
    os.kill(facts(tmp_path / "killed", executor)["pid"], signal.SIGKILL)
    status = finish(executor)["killed"]
    assert (status.state, status.exit_code) == (State.failed, -signal.SIGKILL)
    assert "SIGKILL" in status.reason
    until(lambda: is_gone(int((tmp_path / "killed.helper").read_text(encoding="utf-8"))))
    executor.submit(program(tmp_path, "killed", "say", "again"))
    assert finish(executor)["killed"].state is State.succeeded


def test_a_killed_actor_takes_its_processes_along_and_the_task_can_restart(executor, tmp_path):
    executor.submit(program(tmp_path, "orphan", "tree", str(tmp_path / "orphan")))
    pid = facts(tmp_path / "orphan", executor)["pid"]
    actor = psutil.Process(pid).parent().parent()
    assert "Supervisor" in " ".join(actor.cmdline())
    actor.kill()
    until(lambda: is_gone(pid))
    status = finish(executor)["orphan"]
    assert status.state is State.failed
    assert "actor" in status.reason
    executor.submit(program(tmp_path, "orphan", "say", "again"))
    assert finish(executor)["orphan"].state is State.succeeded


def test_cancel(executor, tmp_path):
    executor.submit(program(tmp_path, "runs", "stubborn", str(tmp_path / "runs"), num_cpus=2))
    executor.submit(program(tmp_path, "waits", "note", str(tmp_path / "waits")))
    pid = facts(tmp_path / "runs", executor)["pid"]
    executor.cancel("waits")
    executor.cancel("runs", grace_s=1000)
    # It did not wait for the grace: the process only notes TERM.
    until((tmp_path / "runs.term").exists)
    assert not is_gone(pid)
    assert executor.poll()["runs"].state is State.running
    executor.cancel("runs", grace_s=0.3)
    statuses = finish(executor)
    assert (statuses["runs"].state, statuses["waits"].state) == (State.cancelled, State.cancelled)
    assert is_gone(pid)
    assert not (tmp_path / "waits").exists()


def test_tasks_that_no_node_could_hold_are_refused(executor, tmp_path):
    with pytest.raises(ValueError, match=r"needs 3 CPUs and 0 GPUs on one node.*have: 2 CPUs, 0 GPUs"):
        executor.submit(program(tmp_path, "huge", "note", num_cpus=3))
    with pytest.raises(ValueError, match="num_groups must be at least 1"):
        RayExecutor(num_groups=0)
    executor.submit(program(tmp_path, "twice", "say", "x"))
    with pytest.raises(ValueError, match="has not ended"):
        executor.submit(program(tmp_path, "twice", "say", "x"))
    finish(executor)


def test_a_guest_needs_the_token_and_leaves_the_cluster_as_it_was(executor, tmp_path):
    before = servers(executor)
    wrong = tmp_path / "wrong"
    wrong.write_text("0" * 64, encoding="utf-8")
    with_token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(executor.session.token_path)}
    without = python(CLIENT, gcs_address(), str(tmp_path), **with_token | {"RAY_AUTH_TOKEN_PATH": str(wrong)})
    assert without.returncode != 0
    assert "refuses this session's token" in without.stderr
    assert not (tmp_path / "guest").exists()
    guest = python(CLIENT, gcs_address(), str(tmp_path), **with_token)
    assert guest.stdout.split() == ["succeeded"], guest.stderr
    assert (tmp_path / "guest").exists()
    assert servers(executor) == before


OWNER = """
import os, signal, sys
before, handler = dict(os.environ), signal.getsignal(signal.SIGTERM)
from pathlib import Path
import psutil
import ray
from task_waiting import facts, finish, is_gone, program, until
from launch.ray_executor import RayExecutor

imported = dict(os.environ)
folder = Path(sys.argv[1])
for attempt in ("first", "second"):
    executor = RayExecutor(num_cpus=2)
    executor.submit(program(folder, "runs", "tree", str(folder / attempt)))
    executor.submit(program(folder, "done", "say", "x"))
    facts(folder / attempt, executor)
    processes = executor.session.processes()
    assert len(processes) > 4
    executor.close()
    executor.close()
    assert all(is_gone(process.pid) for process in processes)
    assert executor.poll()["runs"].state.value == "cancelled"
    try:
        executor.submit(program(folder, "late", "say", "x"))
    except RuntimeError as error:
        assert "is closed" in str(error)
    else:
        raise AssertionError("a closed executor took a task")
    assert not executor.session.directory.exists()
    assert dict(os.environ) == imported
    assert signal.getsignal(signal.SIGTERM) == handler
    until(lambda: not psutil.Process().children(recursive=True))
print("clean")
"""


def test_close_ends_a_private_ray_completely_and_no_other(executor, tmp_path):
    before = servers(executor)
    owner = python(OWNER, str(tmp_path))
    assert owner.stdout.split() == ["clean"], owner.stderr
    assert len(before) == 2
    assert servers(executor) == before
    executor.submit(program(tmp_path, "still", "say", "here"))
    assert finish(executor)["still"].state is State.succeeded


def test_nothing_survives_a_killed_driver(tmp_path):
    programs = str(Path(__file__).parent.parent / "launch" / "programs")
    outer = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    driver = subprocess.Popen(
        [sys.executable, "-m", "driver_program", "ray", str(tmp_path)], env={**outer, "PYTHONPATH": programs}
    )
    trained = [facts(tmp_path / name)["pid"] for name in ("first", "second")]
    pids = [process.pid for process in psutil.Process(driver.pid).children(recursive=True)]
    helpers = [int((tmp_path / f"{name}.helper").read_text(encoding="utf-8")) for name in ("first", "second")]
    assert {*trained, *helpers} <= set(pids)
    (token,) = {
        Path(psutil.Process(pid).environ()["RAY_AUTH_TOKEN_PATH"])
        for pid in pids
        if psutil.Process(pid).name() == "raylet"
    }
    assert token.exists()
    driver.kill()
    driver.wait()
    for pid in pids:
        until(lambda pid=pid: is_gone(pid))
    assert not token.parent.exists()
