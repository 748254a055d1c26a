import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from launch.ray_session import (
    PrivateSession,
    end_processes,
    remove_abandoned,
    short_parent,
    termination_handler_kept,
    unreachable,
)

LEAVE = """
import os, sys
from pathlib import Path
from launch.ray_session import PrivateSession
print(PrivateSession(Path(sys.argv[1])).directory, flush=True)
os._exit(9)
"""
WITH_CHILD = """
import subprocess, sys, time
subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(1000)'])
time.sleep(1000)
"""


def leave_directory(parent):
    done = subprocess.run([sys.executable, "-c", LEAVE, str(parent)], capture_output=True, text=True)
    return Path(done.stdout.strip())


@pytest.fixture
def parent():
    # pytest's own temporary directories are too long for sockets.
    path = Path("/tmp") / f"t{os.getpid()}"
    path.mkdir()
    yield path
    shutil.rmtree(path)


def test_directory_and_token_are_private_and_fresh(parent):
    sessions = [PrivateSession(parent) for _ in range(2)]
    for session in sessions:
        assert session.directory.stat().st_mode & 0o777 == 0o700
        assert session.token_path.stat().st_mode & 0o777 == 0o600
    tokens = {session.token_path.read_text(encoding="utf-8") for session in sessions}
    assert len(tokens) == 2
    assert all(len(token) == 64 for token in tokens)
    for session in sessions:
        session.remove()
        session.remove()
    assert list(parent.iterdir()) == []


def test_the_environment_comes_back_as_it_was(parent, monkeypatch):
    monkeypatch.setenv("RAY_AUTH_TOKEN", "mine")
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    monkeypatch.setenv("RAY_OTHER", "stays")
    before = dict(os.environ)
    session = PrivateSession(parent)
    session.enter_environment()
    assert "RAY_AUTH_TOKEN" not in os.environ
    assert "RAY_ADDRESS" not in os.environ
    assert os.environ["RAY_AUTH_MODE"] == "token"
    assert os.environ["RAY_AUTH_TOKEN_PATH"] == str(session.token_path)
    os.environ["RAY_SET_BY_RAY"] = "1"
    session.leave_environment()
    session.remove()
    assert dict(os.environ) == before


def test_socket_paths_must_fit():
    long = Path("/" + "x" * 60)
    assert short_parent([long, Path("/tmp")]) == Path("/tmp")
    with pytest.raises(
        ValueError, match=r"may have 107 bytes; too long: /x+ \(would give 1\d\d bytes\); give a shorter"
    ):
        short_parent([long])


def test_directories_of_killed_owners_are_removed_and_others_stay(parent):
    left = leave_directory(parent)
    assert left.exists()
    mine = PrivateSession(parent)
    assert not left.exists()
    remove_abandoned(parent)
    assert mine.directory.exists()
    mine.remove()


def test_a_directory_that_a_process_still_names_stays(parent):
    left = leave_directory(parent)
    user = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)", str(left)])
    remove_abandoned(parent)
    assert left.exists()
    user.kill()
    user.wait()
    remove_abandoned(parent)
    assert not left.exists()


def test_only_children_that_name_the_directory_are_of_the_session(parent):
    session = PrivateSession(parent)
    ours = subprocess.Popen([sys.executable, "-c", WITH_CHILD, str(session.directory)])
    other = subprocess.Popen([sys.executable, "-c", WITH_CHILD])
    strangers = []
    try:
        while not psutil.Process(ours.pid).children() or not psutil.Process(other.pid).children():
            pass
        strangers = psutil.Process(other.pid).children()
        found = session.processes()
        assert {process.pid for process in found} == {ours.pid, psutil.Process(ours.pid).children()[0].pid}
        assert end_processes(found, timeout_s=0.1) == 2
        assert ours.wait(60) is not None
        assert other.poll() is None
    finally:
        other.kill()
        other.wait()
        end_processes(strangers, timeout_s=0)
        session.remove()


def test_the_handler_of_term_is_put_back():
    def handler(number, frame):
        del number, frame

    before = signal.signal(signal.SIGTERM, handler)
    try:
        with termination_handler_kept():
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        assert signal.getsignal(signal.SIGTERM) is handler
    finally:
        signal.signal(signal.SIGTERM, before)


def test_the_guard_clears_up_after_a_killed_owner_and_spares_strangers(parent):
    directory = parent / "private\ndir"
    directory.mkdir()
    code = "import sys, time; f = open(sys.argv[1] + '/log', 'w'); print(flush=True); time.sleep(1000)"

    def start(title):
        command = [title, "-c", code, str(directory)]
        process = subprocess.Popen(command, executable=sys.executable, stdout=subprocess.PIPE)
        assert process.stdout.readline() == b"\n"
        return process

    ours, reader = start("ray::Worker"), start("tail")
    guard = [sys.executable, "-m", "launch.ray_guard"]
    subprocess.run(guard, input=os.fsencode(directory) + b"\ndismissed\n", check=True)
    assert directory.exists()
    subprocess.run(guard, input=os.fsencode(directory) + b"\n", check=True)
    assert not directory.exists()
    assert ours.wait(60) == -signal.SIGKILL
    assert reader.poll() is None
    reader.kill()
    reader.wait()


def test_an_address_where_nobody_answers_is_named_at_once():
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        assert unreachable(address) is None
    problem = unreachable(address)
    assert problem is not None
    assert f"nothing answers at {address}" in problem
    assert unreachable("auto") is None
    assert unreachable("ray://127.0.0.1:1") is None
    assert unreachable("127.0.0.1:99999999") is not None
