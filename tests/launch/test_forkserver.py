import sys

import pytest
from task_waiting import facts, finish, program, until

from launch.fork_client import ForkServer
from launch.local import LocalExecutor
from launch.task import State


def test_preloaded_modules_are_there_and_started_no_thread(tmp_path):
    server = ForkServer(("torch", "no_such_module_here"))
    try:
        until(lambda: server.poll() or server.is_ready, timeout_s=60)
        assert server.num_threads == 1
        assert list(server.failures) == ["no_such_module_here"]
        assert "ModuleNotFoundError" in server.failures["no_such_module_here"]
    finally:
        server.close()
    assert not server.is_alive


def test_one_more_task_finds_the_preloaded_modules_and_one_thread(tmp_path):
    with LocalExecutor(preload=("torch",)) as executor:
        executor.submit(program(tmp_path, "warm", "note", str(tmp_path / "warm")))
        finish(executor)
        executor.submit(program(tmp_path, "more", "note", str(tmp_path / "more")))
        finish(executor)
        fresh = program(tmp_path, "fresh", "note", str(tmp_path / "fresh"), env={"PYTHONHASHSEED": "0"})
        executor.submit(fresh)
        finish(executor)
    seen = facts(tmp_path / "more")
    assert "torch" in seen["modules"]
    assert seen["torch_threads"] == 1
    assert "torch" not in facts(tmp_path / "fresh")["modules"]


@pytest.mark.distributed
def test_forked_processes_compute_together_over_the_rendezvous_file(tmp_path):
    with LocalExecutor(preload=("torch",)) as executor:
        executor.submit(program(tmp_path, "sum", "gloo", num_processes=2, num_cpus=2))
        assert finish(executor)["sum"].state is State.succeeded
    assert (tmp_path / "sum.log").read_text(encoding="utf-8").splitlines().count("sum 3") == 2


def test_children_have_different_random_states(tmp_path):
    (tmp_path / "draw_program.py").write_text("import numpy, random\nprint(numpy.random.rand(), random.random())\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(tmp_path))
        with LocalExecutor(preload=("numpy",)) as executor:
            for name in ("a", "b"):
                executor.submit(program(tmp_path, name, module="draw_program"))
            finish(executor)
    drawn = {value for name in "ab" for value in (tmp_path / f"{name}.log").read_text(encoding="utf-8").split()}
    assert len(drawn) == 4


def test_threads_of_a_preloaded_module_lead_to_fresh_interpreters(tmp_path):
    text = "import threading, time\nthreading.Thread(target=time.sleep, args=(100,), daemon=True).start()\n"
    (tmp_path / "thread_program.py").write_text(text, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(tmp_path))
        with LocalExecutor(preload=("thread_program",)) as executor:
            executor.submit(program(tmp_path, "one", "note", str(tmp_path / "out")))
            assert finish(executor)["one"].state is State.succeeded
    assert "thread_program" not in facts(tmp_path / "out")["modules"]


def test_files_in_the_working_directory_do_not_hide_installed_modules(tmp_path, monkeypatch):
    (tmp_path / "numpy.py").write_text("raise RuntimeError('hidden')\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "sub"
    folder.mkdir()
    (folder / "import_program.py").write_text("import numpy\nprint(numpy.__version__)\n", encoding="utf-8")
    monkeypatch.setattr(sys, "path", [str(folder), *(path for path in sys.path if path)])
    with LocalExecutor(preload=("numpy",)) as executor:
        executor.submit(program(tmp_path, "forked", module="import_program"))
        executor.submit(program(tmp_path, "fresh", module="import_program", env={"PYTHONHASHSEED": "0"}))
        statuses = finish(executor)
    assert {status.state for status in statuses.values()} == {State.succeeded}


def test_a_log_ends_with_the_error_and_not_with_what_libraries_say_after_it(tmp_path):
    with LocalExecutor() as executor:
        executor.submit(program(tmp_path, "leaky", "leak", "the real reason"))
        assert finish(executor)["leaky"].exit_code == 1
    assert (tmp_path / "leaky.log").read_text().splitlines()[-1] == "RuntimeError: the real reason"
