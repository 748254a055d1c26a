"""The client's side of the fork server."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from launch.process import MessageBuffer, ProcessSpec, added_import_path, encode

# One thread per library while preloading: a thread pool made then would not exist in the forked children. The children
# set their own counts. CUDA must not be initialised before a fork either; NVML answers "is there a GPU" without it.
_SERVER_ENV = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
}
_SERVER_LOST = "the process that started it (launch.forkserver) died"


@dataclass(slots=True, eq=False)
class Process:
    """One process that a fork server started; :meth:`ForkServer.poll` keeps it up to date."""

    identity: int
    pid: int | None = None
    """None until it runs."""
    exit_code: int | None = None
    """None until it ended; negative is the signal."""
    order: int = 0
    """Processes that ended earlier have smaller numbers."""
    error: str = ""
    """Why it could not be started or watched."""


class ForkServer:
    """Starts processes through ``python -m launch.forkserver``; no method blocks, except :meth:`close`.

    Args:
        preload: Modules that every forked process finds imported; looked for where this process looks (``sys.path``).
    """

    def __init__(self, preload: Sequence[str] = ()) -> None:
        self.failures: dict[str, str] = {}
        self.num_threads = 0
        self.is_ready = False
        self._processes: dict[int, Process] = {}
        self._num_started = 0
        self._num_ended = 0
        self._outbox = b""
        self._buffer = MessageBuffer()
        self._channel, theirs = socket.socketpair()
        self._channel.setblocking(False)
        arguments = [str(theirs.fileno()), str(os.getpid()), *preload]
        with theirs:
            self._server = subprocess.Popen(
                [sys.executable, "-P", "-m", "launch.forkserver", *arguments],
                env={**os.environ, **_SERVER_ENV, "PYTHONPATH": added_import_path(sys.path)},
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        """Process id of the server."""
        return self._server.pid

    @property
    def is_alive(self) -> bool:
        """Whether new processes can be started; as of the latest :meth:`poll`."""
        return self._channel.fileno() >= 0

    def start(self, spec: ProcessSpec) -> Process:
        """Ask for a process; it begins when the server has finished preloading."""
        self._num_started += 1
        process = Process(self._num_started)
        self._processes[process.identity] = process
        self._send({"id": process.identity, "start": spec.to_json()})
        return process

    def signal(self, process: Process, number: int) -> None:
        """Send a signal (KILL: to its whole process group), unless it has ended already."""
        if process.exit_code is None:
            self._send({"id": process.identity, "signal": int(number)})

    def poll(self) -> None:
        """Take in what the server reported and hand over what it has not yet taken."""
        self._flush()
        while self.is_alive:
            try:
                data = self._channel.recv(1 << 16)
            except BlockingIOError:
                return
            except OSError:
                data = b""
            if not data:
                self._lose_server()
                return
            for message in self._buffer.feed(data):
                self._take(message)

    def close(self, *, timeout_s: float = 10.0) -> None:
        """Kill everything that still runs and end the server. Idempotent."""
        self._channel.close()
        try:
            self._server.wait(timeout_s)
        except subprocess.TimeoutExpired:
            # The kernel kills its children with it.
            self._server.kill()
            self._server.wait()
        self._lose_server()

    def _send(self, message: Mapping[str, Any]) -> None:
        self._outbox += encode(message)
        self._flush()

    def _flush(self) -> None:
        with contextlib.suppress(BlockingIOError):
            try:
                while self._outbox and self.is_alive:
                    self._outbox = self._outbox[self._channel.send(self._outbox) :]
            except (BrokenPipeError, ConnectionResetError):
                # What the server said before it died is still there to be read: poll finds the end of it.
                self._outbox = b""

    def _take(self, message: Mapping[str, Any]) -> None:
        if "ready" in message:
            self.is_ready, self.failures, self.num_threads = True, message["failures"], message["threads"]
            return
        process = self._processes[message["id"]]
        if "pid" in message:
            process.pid = message["pid"]
            return
        self._end(process, message.get("exit", 1), message.get("error", ""))

    def _end(self, process: Process, exit_code: int, error: str) -> None:
        self._num_ended += 1
        process.exit_code, process.order, process.error = exit_code, self._num_ended, error
        del self._processes[process.identity]

    def _lose_server(self) -> None:
        self._channel.close()
        for process in list(self._processes.values()):
            self._end(process, -signal.SIGKILL, _SERVER_LOST)
