"""Processes that end at a moment which the test chooses by what they do, so that no clock and no load matters."""

import os
import resource
import signal
import sys
import traceback
from collections.abc import Callable, Mapping
from itertools import count
from pathlib import Path

_CHANGES = {"os.chmod", "os.link", "os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.symlink", "os.truncate"}
_CALLS_PER_QUESTION = 500
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC


def fork(work: Callable[[], int | None], *, log: Path, env: Mapping[str, str] | None = None) -> int:
    """Run ``work`` in a child whose exit code is what it returns; returns its process id."""
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return pid
    code = 99
    try:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(descriptor, 2)
        sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
        os.environ.update(env or {})
        code = work() or 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def wait(pid: int) -> int:
    """Exit code of a process, negative for the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def die() -> None:
    """End this process as an out-of-memory killer does."""
    os.kill(os.getpid(), signal.SIGKILL)


def at_change(is_due: Callable[[], bool], act: Callable[[], None] = die) -> None:
    """Call ``act`` just before the first change of a file or directory at which ``is_due`` holds.

    Changes are what Python reports as such: created, opened for writing, renamed and removed. They are not its writes
    into open files, see :func:`die_at_size`, nor what libraries in other languages do.
    """

    is_over = False

    def look(event: str, arguments: tuple) -> None:
        nonlocal is_over
        is_change = event in _CHANGES or (event == "open" and arguments[2] & _WRITES)
        if is_change and not is_over and is_due():
            is_over = True
            act()

    sys.addaudithook(look)


def die_at_change(number: int) -> None:
    """End this process just before its ``number``-th change of a file or directory from now."""
    changes = count(1)
    at_change(lambda: next(changes) == number)


def die_at_size(num_bytes: int) -> None:
    """Let the kernel end this process, by SIGXFSZ, when it writes a file beyond ``num_bytes``: inside the write."""
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, num_bytes))


def at_call(num_calls: int, begun: Callable[[], bool], act: Callable[[], None] = die) -> None:
    """Call ``act`` in the midst of the work: ``num_calls`` calls of functions after ``begun`` holds.

    Beginnings and ends of functions are counted, Python's and others', in this thread. ``begun`` is asked at every
    five-hundredth, and not any more when it has held.
    """
    calls, left = count(), None

    def look(*_: object) -> None:
        nonlocal left
        if left is None:
            if next(calls) % _CALLS_PER_QUESTION or not begun():
                return
            left = num_calls
        left -= 1
        if left < 0:
            sys.setprofile(None)
            act()

    sys.setprofile(look)
