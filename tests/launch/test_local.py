import os
import signal
import subprocess
import sys

import psutil
import pytest
from task_waiting import facts, finish, is_gone, program, until

from launch.local import LocalExecutor
from launch.resources import available_cores
from launch.task import State


@pytest.fixture
def two_cores():
    cores = available_cores()[:2]
    if len(cores) < 2:
        pytest.skip("needs two cores")
    return cores


@pytest.fixture
def executor(two_cores):
    made = LocalExecutor(cores=two_cores, gpus=("GPU-a", "GPU-b"), grace_s=0.5)
    yield made
    made.close()


def test_a_process_gets_arguments_environment_rank_and_a_session_of_its_own(executor, tmp_path):
    out = tmp_path / "out"
    executor.submit(program(tmp_path, "one", "note", str(out), "a 'b' $c\n", env={"FLAG": "x y\u00e9"}))
    assert finish(executor)["one"].state is State.succeeded
    seen = facts(out)
    assert seen["argv"][1:] == ["note", str(out), "a 'b' $c\n"]
    assert (seen["rank"], seen["local_rank"], seen["world_size"]) == ("0", "0", "1")
    assert seen["flag"] == "x y\u00e9"
    assert seen["session"] == seen["pid"]
    assert seen["threads"] == "1"
    assert seen["gpus"] == ""
    assert seen["cwd"] == os.getcwd()


def test_every_process_of_a_group_has_its_rank_and_shares_cores_and_rendezvous(executor, tmp_path):
    executor.submit(program(tmp_path, "ranks", "note by rank", str(tmp_path / "out"), num_processes=3, num_cpus=2))
    executor.submit(program(tmp_path, "gpus", "note", str(tmp_path / "gpus"), num_gpus=2))
    assert {status.state for status in finish(executor).values()} == {State.succeeded}
    seen = [facts(tmp_path / f"out{rank}") for rank in range(3)]
    assert [one["rank"] for one in seen] == ["0", "1", "2"]
    assert {one["world_size"] for one in seen} == {"3"}
    assert {len(one["cores"]) for one in seen} == {2}
    assert len({one["rendezvous"] for one in seen}) == 1
    assert seen[0]["rendezvous"] != facts(tmp_path / "gpus")["rendezvous"]
    assert facts(tmp_path / "gpus")["gpus"] == "GPU-a,GPU-b"


def test_tasks_that_run_together_have_disjoint_cores(executor, tmp_path):
    for name in ("a", "b"):
        executor.submit(program(tmp_path, name, "sleep", str(tmp_path / name), "1000"))
    first, second = facts(tmp_path / "a", executor), facts(tmp_path / "b", executor)
    assert len(first["cores"]) == len(second["cores"]) == 1
    assert set(first["cores"]).isdisjoint(second["cores"])


def waiting(folder, name, **fields):
    """A task that ends when the file ``<name> may end`` appears."""
    return program(folder, name, "wait for", str(folder / name), str(folder / f"{name} may end"), **fields)


def test_the_queue_is_first_in_first_out_and_a_large_task_is_not_overtaken(executor, tmp_path):
    sizes = {"small": 1, "large": 2, "late": 1}
    for name, num_cpus in sizes.items():
        executor.submit(waiting(tmp_path, name, num_cpus=num_cpus))
    for number, name in enumerate(sizes):
        facts(tmp_path / name, executor)
        states = [State.succeeded] * number + [State.running] + [State.queued] * (2 - number)
        assert [status.state for status in executor.poll().values()] == states
        (tmp_path / f"{name} may end").touch()
        until(lambda name=name: executor.poll()[name].is_final)
    assert {name: status.state for name, status in executor.poll().items()} == dict.fromkeys(sizes, State.succeeded)


def test_no_more_groups_than_asked_for(tmp_path, two_cores):
    with LocalExecutor(1, cores=two_cores) as executor:
        for name in ("a", "b"):
            executor.submit(waiting(tmp_path, name))
        facts(tmp_path / "a", executor)
        assert [status.state for status in executor.poll().values()] == [State.running, State.queued]
        assert not (tmp_path / "b").exists()
        (tmp_path / "a may end").touch()
        facts(tmp_path / "b", executor)
        assert [status.state for status in executor.poll().values()] == [State.succeeded, State.running]


def test_tasks_that_could_never_run_are_refused(executor, tmp_path):
    with pytest.raises(ValueError, match="needs 3 cores, this machine offers 2"):
        executor.submit(program(tmp_path, "a", "note", num_cpus=3))
    with pytest.raises(ValueError, match="needs 3 GPUs, this machine offers 2"):
        executor.submit(program(tmp_path, "a", "note", num_gpus=3))
    with pytest.raises(ValueError, match="num_groups must be at least 1"):
        LocalExecutor(0)
    assert executor.poll() == {}


def test_a_failing_rank_ends_the_others_when_the_grace_is_over(executor, tmp_path):
    executor.submit(program(tmp_path, "two", "one fails", str(tmp_path / "out"), num_processes=2))
    other = facts(tmp_path / "out", executor)["pid"]
    status = finish(executor)["two"]
    assert (status.state, status.exit_code) == (State.failed, 7)
    assert "process 1 of 2 exited with code 7" in status.reason
    assert is_gone(other)


def test_a_failing_rank_leaves_the_others_the_grace(tmp_path, two_cores):
    with LocalExecutor(cores=two_cores, grace_s=1000) as executor:
        executor.submit(program(tmp_path, "two", "one fails", str(tmp_path / "out"), num_processes=2))
        other = facts(tmp_path / "out", executor)["pid"]
        until(lambda: executor.poll() and (tmp_path / "out.term").exists())
        assert executor.poll()["two"].state is State.running
        assert not is_gone(other)
        executor.cancel("two", grace_s=0)
        finish(executor)
        assert is_gone(other)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV, signal.SIGTERM])
def test_a_signal_is_reported(executor, tmp_path, number):
    executor.submit(program(tmp_path, "killed", "signal", str(int(number))))
    status = finish(executor)["killed"]
    assert (status.state, status.exit_code) == (State.failed, -number)
    assert number.name in status.reason


def test_an_exception_is_in_the_log_and_the_exit_code(executor, tmp_path):
    executor.submit(program(tmp_path, "raise", "raise", "no such luck"))
    executor.submit(program(tmp_path, "exit", "exit", "3"))
    executor.submit(program(tmp_path, "missing", module="no_such_module_here"))
    statuses = finish(executor)
    assert [statuses[name].exit_code for name in ("raise", "exit", "missing")] == [1, 3, 1]
    log = (tmp_path / "raise.log").read_text(encoding="utf-8")
    assert log.rstrip().endswith("RuntimeError: no such luck")
    assert "no_such_module_here" in (tmp_path / "missing.log").read_text(encoding="utf-8")


def test_a_log_that_cannot_be_written_fails_the_task(executor, tmp_path):
    (tmp_path / "file").write_text("", encoding="utf-8")
    executor.submit(program(tmp_path, "one", "say", "x", log_path=tmp_path / "file" / "log.txt"))
    status = finish(executor)["one"]
    assert status.state is State.failed
    assert "cannot open the log" in status.reason


@pytest.mark.parametrize("name", ["with space", "quote'\"", "new\nline", "$(id);&", "-rf", "\u00fcn\u00efcode"])
@pytest.mark.parametrize("env", [{}, {"PYTHONHASHSEED": "1"}], ids=["forked", "fresh"])
def test_weird_directories_and_names(executor, tmp_path, name, env):
    folder = tmp_path / name / "deeper"
    executor.submit(program(folder, name, "say", "said " + name, env=env))
    assert finish(executor)[name].state is State.succeeded
    log = (folder / f"{name}.log").read_text(encoding="utf-8")
    assert "said " + name in log
    assert "to stderr" in log


def test_cancel_is_gentle_first(executor, tmp_path):
    executor.submit(program(tmp_path, "gentle", "sleep", str(tmp_path / "gentle"), "1000"))
    executor.submit(program(tmp_path, "stubborn", "stubborn", str(tmp_path / "stubborn")))
    executor.submit(program(tmp_path, "waits", "note", str(tmp_path / "waits")))
    pids = {name: facts(tmp_path / name, executor)["pid"] for name in ("gentle", "stubborn")}
    for name in ("waits", "gentle", "stubborn"):
        executor.cancel(name, grace_s=1000)
    # It did not wait for the grace, in which TERM has ended one and was only noticed by the other.
    assert executor.poll()["waits"].state is State.cancelled
    until(lambda: executor.poll()["gentle"].is_final)
    until((tmp_path / "stubborn.term").exists)
    assert executor.poll()["stubborn"].state is State.running
    assert (is_gone(pids["gentle"]), is_gone(pids["stubborn"])) == (True, False)
    executor.cancel("stubborn", grace_s=0.3)
    assert {status.state for status in finish(executor).values()} == {State.cancelled}
    assert not (tmp_path / "waits").exists()
    executor.cancel("waits")
    with pytest.raises(ValueError, match="there is no task 'other'; submitted were: gentle, stubborn, waits"):
        executor.cancel("other")


def test_a_name_can_be_used_again_when_its_task_has_ended(executor, tmp_path):
    executor.submit(program(tmp_path, "one", "exit", "1"))
    with pytest.raises(ValueError, match="has not ended"):
        executor.submit(program(tmp_path, "one", "exit", "0"))
    assert finish(executor)["one"].state is State.failed
    executor.submit(program(tmp_path, "one", "say", "again"))
    assert finish(executor)["one"].state is State.succeeded


def test_close_ends_what_it_started_with_helpers_and_nothing_else(tmp_path):
    bystander = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"])
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    executor = LocalExecutor(1, grace_s=0.3)
    executor.submit(program(tmp_path, "tree", "tree", str(tmp_path / "out")))
    executor.submit(program(tmp_path, "waits", "tree", str(tmp_path / "waits")))
    pids = [facts(tmp_path / "out", executor)["pid"], int((tmp_path / "out.helper").read_text(encoding="utf-8"))]
    executor.close()
    executor.close()
    assert all(is_gone(pid) for pid in pids)
    assert {child.pid for child in psutil.Process().children(recursive=True)} == before
    assert {status.state for status in executor.poll().values()} == {State.cancelled}
    with pytest.raises(RuntimeError, match="is closed"):
        executor.submit(program(tmp_path, "more", "note"))
    assert bystander.poll() is None
    bystander.kill()
    bystander.wait()


def test_helpers_of_a_process_do_not_outlive_it(executor, tmp_path):
    executor.submit(program(tmp_path, "tree", "tree", str(tmp_path / "out")))
    pid = facts(tmp_path / "out", executor)["pid"]
    helper = int((tmp_path / "out.helper").read_text(encoding="utf-8"))
    os.kill(pid, signal.SIGKILL)
    finish(executor)
    until(lambda: is_gone(helper))


def start_driver(kind, folder):
    path = os.pathsep.join(path for path in sys.path if path.endswith("programs"))
    return subprocess.Popen(
        [sys.executable, "-m", "driver_program", kind, str(folder)],
        env={**os.environ, "PYTHONPATH": path},
        start_new_session=True,
    )


@pytest.mark.parametrize("how", ["server alive", "server killed too"])
def test_nothing_survives_a_killed_driver(tmp_path, how, two_cores):
    driver = start_driver("local", tmp_path)
    pids = [facts(tmp_path / name)["pid"] for name in ("first", "second")]
    server = psutil.Process(pids[0]).ppid()
    helpers = [int((tmp_path / f"{name}.helper").read_text(encoding="utf-8")) for name in ("first", "second")]
    driver.kill()
    if how == "server killed too":
        os.kill(server, signal.SIGKILL)
    driver.wait()
    for pid in [*pids, *helpers, server]:
        until(lambda pid=pid: is_gone(pid))


def test_ctrl_c_reaches_the_driver_alone(tmp_path, two_cores):
    driver = start_driver("local", tmp_path)
    pids = [facts(tmp_path / name)["pid"] for name in ("first", "second")]
    os.killpg(driver.pid, signal.SIGINT)
    until((tmp_path / "interrupted").exists)
    assert not is_gone(pids[0])
    (tmp_path / "go on").touch()
    driver.wait(60)
    assert (tmp_path / "interrupted").read_text(encoding="utf-8") == "running"
    assert all(is_gone(pid) for pid in pids)


def test_a_lost_fork_server_fails_its_tasks_and_is_replaced(executor, tmp_path):
    executor.submit(program(tmp_path, "one", "sleep", str(tmp_path / "out"), "1000"))
    pid = facts(tmp_path / "out", executor)["pid"]
    os.kill(psutil.Process(pid).ppid(), signal.SIGKILL)
    status = finish(executor)["one"]
    assert status.state is State.failed
    assert "launch.forkserver" in status.reason
    until(lambda: is_gone(pid))
    executor.submit(program(tmp_path, "one", "say", "again"))
    assert finish(executor)["one"].state is State.succeeded


def test_no_listening_port_is_opened_and_poll_does_not_wait(executor, tmp_path):
    executor.submit(program(tmp_path, "one", "sleep", str(tmp_path / "out"), "1000"))
    facts(tmp_path / "out", executor)
    assert executor.poll()["one"].state is State.running
    tree = [psutil.Process(), *psutil.Process().children(recursive=True)]
    listening = [c for process in tree for c in process.net_connections("all") if c.status == psutil.CONN_LISTEN]
    assert listening == []
    assert len(tree) >= 3


def test_two_executors_choose_different_cores(tmp_path, two_cores, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))  # away from the claims of other tests
    with LocalExecutor() as one, LocalExecutor() as two:
        for name, made in (("a", one), ("b", two)):
            made.submit(program(tmp_path, name, "sleep", str(tmp_path / name), "1000"))
        first, second = facts(tmp_path / "a"), facts(tmp_path / "b")
        assert set(first["cores"]).isdisjoint(second["cores"])
