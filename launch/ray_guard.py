"""Clears up after a killed owner of a private Ray: ``python -m launch.ray_guard``, told what to do on stdin.

The kernel ends the servers of a private Ray with their owner, but Ray's agents go on for a minute and its workers for
seconds, and the directory with the token would stay.
"""

import contextlib
import os
import shutil
import sys
import time
from pathlib import Path

import psutil

DISMISSED = b"dismissed"
_TIMEOUT_S = 20.0
_INTERVAL_S = 0.1
_QUIET_ROUNDS = 5


def ray_processes(directory: Path) -> list[psutil.Process]:
    """Processes that Ray has titled as its own and that hold a file open in ``directory``."""
    found: list[psutil.Process] = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.cmdline()[:1] and process.cmdline()[0].startswith("ray::") and _holds(process.pid, directory):
                found.append(process)
    return found


def clear_up(directory: Path) -> None:
    """Kill what is left of the private Ray in ``directory`` and delete it."""
    deadline = time.monotonic() + _TIMEOUT_S
    quiet_rounds = 0
    # Workers that were just being started turn up late.
    while quiet_rounds < _QUIET_ROUNDS and time.monotonic() < deadline:
        left = ray_processes(directory)
        quiet_rounds = 0 if left else quiet_rounds + 1
        for process in left:
            with contextlib.suppress(psutil.Error):
                process.kill()
        time.sleep(_INTERVAL_S)
    shutil.rmtree(directory, ignore_errors=True)


def main() -> None:
    """Read a directory from stdin until its end; without a word of dismissal after it, clear up."""
    message = sys.stdin.buffer.read().removesuffix(b"\n")
    if message and not message.endswith(b"\n" + DISMISSED):
        clear_up(Path(os.fsdecode(message)))


def _holds(pid: int, directory: Path) -> bool:
    for entry in os.scandir(f"/proc/{pid}/fd"):
        with contextlib.suppress(OSError):
            if Path(os.readlink(entry.path)).is_relative_to(directory):
                return True
    return False


if __name__ == "__main__":
    main()
