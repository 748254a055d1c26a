"""Everything around a private Ray but Ray itself: its folder, its token, its environment and its processes.

Ray 2.60 listens on all interfaces, writes its token readable for all and makes its folders writable for all; so the
token and the folders are put into a directory that only this user can enter. Ray's own folder is one below that: it
opens also the one that it is given.
"""

import contextlib
import fcntl
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path

import psutil

from launch.process import added_import_path
from launch.ray_guard import DISMISSED

_PREFIX = "launch-ray-"
_LOCK_NAME = "lock"
_MAX_SOCKET_PATH_BYTES = 107
# What Ray appends for its longest socket: session_<date>_<time>_<microseconds>_<pid>/sockets/plasma_store.<n>
_LONGEST_SOCKET = "r/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store.10"
_END_TIMEOUT_S = 10.0


class PrivateSession:
    """Private directory (0700) with a fresh token file (0600), and the environment that makes Ray use them.

    A guard (:mod:`launch.ray_guard`) clears up when this process is killed.

    Args:
        parent: Where the directory is made; None tries the temporary directory, then ``/tmp``. The path must be short.

    Raises:
        ValueError: If the paths of Ray's sockets would be longer than the system allows.
    """

    def __init__(self, parent: Path | None = None) -> None:
        chosen = short_parent([parent] if parent else [Path(tempfile.gettempdir()), Path("/tmp")])
        remove_abandoned(chosen)
        self.directory = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=chosen))
        self._lock = os.open(self.directory / _LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        self.ray_dir = self.directory / "r"
        self.ray_dir.mkdir(mode=0o700)
        self.token_path = self.directory / "token"
        descriptor = os.open(self.token_path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w") as file:
            file.write(secrets.token_hex(32))
        self._saved_env = _ray_variables()
        self._guard = subprocess.Popen(
            [sys.executable, "-P", "-m", "launch.ray_guard"],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            env={**os.environ, "PYTHONPATH": added_import_path(sys.path)},
        )
        self._tell_guard(os.fsencode(self.directory))

    def enter_environment(self) -> None:
        """Set the variables that make Ray ask for the token, and nothing that points to another Ray."""
        for name in _ray_variables():
            if name.startswith("RAY_AUTH_") or name in ("RAY_ADDRESS", "RAY_TMPDIR"):
                del os.environ[name]
        os.environ |= {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(self.token_path),
            "RAY_USAGE_STATS_ENABLED": "0",
        }

    def leave_environment(self) -> None:
        """Put all variables of Ray back as they were before this session."""
        for name in _ray_variables():
            del os.environ[name]
        os.environ |= self._saved_env

    def processes(self) -> list[psutil.Process]:
        """Processes of this session: our children that name its directory, and all that descend from them."""
        return _descendants(psutil.Process().children(), str(self.directory))

    def remove(self) -> None:
        """Delete the directory and dismiss the guard. Idempotent."""
        if self._lock < 0:
            return
        shutil.rmtree(self.directory, ignore_errors=True)
        os.close(self._lock)
        self._lock = -1
        self._tell_guard(DISMISSED)
        self._guard.communicate()

    def _tell_guard(self, line: bytes) -> None:
        assert self._guard.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._guard.stdin.write(line + b"\n")
            self._guard.stdin.flush()


@contextlib.contextmanager
def termination_handler_kept() -> Iterator[None]:
    """Put the handler of TERM back when the block ends: ``ray.init`` replaces it by its own."""
    handler = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread() and handler is not None:
            signal.signal(signal.SIGTERM, handler)


def short_parent(candidates: Iterable[Path]) -> Path:
    """The first of ``candidates`` that is short enough for Ray's sockets.

    Raises:
        ValueError: If none is.
    """
    tried: list[str] = []
    for parent in candidates:
        longest = parent.absolute() / f"{_PREFIX}xxxxxxxx" / _LONGEST_SOCKET
        num_bytes = len(os.fsencode(longest))
        if num_bytes <= _MAX_SOCKET_PATH_BYTES:
            return parent.absolute()
        tried.append(f"{parent} (would give {num_bytes} bytes)")
    raise ValueError(
        f"the path of a Ray socket may have {_MAX_SOCKET_PATH_BYTES} bytes; too long: {', '.join(tried)}; "
        "give a shorter session_parent, for example /tmp"
    )


def unreachable(address: str, *, timeout_s: float = 5.0) -> str | None:
    """Say why nothing answers at a ``host:port``; None when something does, or for another form of address."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or "/" in host:
        return None
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout_s).close()
    except (OSError, OverflowError) as error:
        return f"nothing answers at {address} ({error}); give the address of a running Ray cluster, or none"
    return None


def end_processes(processes: Iterable[psutil.Process], *, timeout_s: float = _END_TIMEOUT_S) -> int:
    """Wait for ``processes`` to end, then kill the rest; returns how many had to be killed.

    A process is known by id and start time, so a stranger that got the same id is left alone.
    """
    _, alive = psutil.wait_procs(list(processes), timeout=timeout_s)
    for process in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(alive, timeout=timeout_s)
    return len(alive)


def remove_abandoned(parent: Path) -> None:
    """Delete directories of sessions in ``parent`` whose owner, a process of this user, was killed.

    The owner's lock tells: the kernel has released it. A directory that a process still names is left for later.
    """
    for directory in parent.glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):
            if directory.is_symlink() or directory.stat().st_uid != os.getuid():
                continue
            with open(directory / _LOCK_NAME, "rb") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if not _descendants(psutil.process_iter(), str(directory)):
                    shutil.rmtree(directory, ignore_errors=True)


def _descendants(roots: Iterable[psutil.Process], text: str) -> list[psutil.Process]:
    found: list[psutil.Process] = []
    for process in roots:
        with contextlib.suppress(psutil.Error):
            if any(text in argument for argument in process.cmdline()):
                found += [process, *process.children(recursive=True)]
    return found


def _ray_variables() -> dict[str, str]:
    # ray.init also puts its debugger into PYTHONBREAKPOINT.
    names = [name for name in os.environ if name.startswith("RAY_") or name == "PYTHONBREAKPOINT"]
    return {name: os.environ[name] for name in names}
