"""A small process that starts, watches and ends the processes of tasks: ``python -m launch.forkserver``.

Clients (:class:`launch.fork_client.ForkServer`) start it with one end of a socket pair: it has no path and listens
nowhere. It imports the modules it is told to once; a child is then a fork, ready in milliseconds, with a session,
cores, environment and log of its own. It stays single-threaded, so that forking is safe; should an import start
threads all the same, children get fresh interpreters instead. When the client's end closes, or the client's process is
gone, it kills every child with all of its process group and ends; when it is killed itself, a guard does that.
"""

import atexit
import contextlib
import dataclasses
import gc
import importlib
import os
import runpy
import select
import signal
import socket
import sys
import time
import traceback
from collections.abc import Sequence
from typing import Any

from launch.parent_death import DiesWithParent
from launch.process import (
    RENDEZVOUS_VARIABLE,
    MessageBuffer,
    ProcessSpec,
    added_import_path,
    encode,
    interpreter_command,
)

_HEARTBEAT_S = 0.5
_REAP_TIMEOUT_S = 5.0


class Guard:
    """A second process that outlives a killed server by moments, to kill the process groups of its children.

    The kernel kills the children themselves with the server, but not what they have started.

    Args:
        descriptor: File descriptor that the guard closes: its copy of the server's connection.
    """

    def __init__(self, descriptor: int) -> None:
        read_end, self._write_end = os.pipe()
        if os.fork() == 0:
            os.close(self._write_end)
            os.close(descriptor)
            os.setsid()
            _kill_when_closed(read_end)
            os._exit(0)
        os.close(read_end)

    def enter_child(self) -> None:
        """In a new child, which leads a process group by now: tell of the group."""
        os.write(self._write_end, b"+%d\n" % os.getpid())
        os.close(self._write_end)

    def forget(self, pid: int) -> None:
        """Leave the group of ``pid`` alone from now on: it is gone, and its number may be given to others."""
        with contextlib.suppress(BrokenPipeError):
            os.write(self._write_end, b"-%d\n" % pid)


class Server:
    """The loop of the fork server.

    Args:
        channel: Connection to the client.
        parent_pid: Process id of the client.
        guard: Is told of every child.
    """

    def __init__(self, channel: socket.socket, parent_pid: int, guard: Guard) -> None:
        self._channel = channel
        self._guard = guard
        self._parent_pid = parent_pid
        self._buffer = MessageBuffer()
        self._children: dict[int, int] = {}
        self._files: set[str] = set()
        self._can_fork = True
        self._dies_with_server = DiesWithParent()
        self._wakeup_read, self._wakeup_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.signal(signal.SIGCHLD, _ignore_signal)
        signal.set_wakeup_fd(self._wakeup_write, warn_on_full_buffer=False)

    def announce(self, failures: dict[str, str]) -> None:
        """Tell the client that preloading is over."""
        num_threads = len(os.listdir("/proc/self/task"))
        self._can_fork = num_threads == 1
        self._send({"ready": True, "failures": failures, "threads": num_threads})

    def serve(self) -> ProcessSpec | None:
        """Serve until the client is gone (None), or, in a new child, return what the child shall run."""
        while os.getppid() == self._parent_pid:
            readable, _, _ = select.select([self._channel, self._wakeup_read], [], [], _HEARTBEAT_S)
            try:
                self._reap()
                if self._channel in readable:
                    data = self._channel.recv(1 << 16)
                    if not data:
                        break
                    for message in self._buffer.feed(data):
                        spec = self._handle(message)
                        if spec is not None:
                            return spec
            except (BrokenPipeError, ConnectionResetError):
                break
        self._end_children()
        return None

    def _handle(self, message: dict[str, Any]) -> ProcessSpec | None:
        if "start" in message:
            return self._start(message["id"], ProcessSpec.from_json(message["start"]))
        self._signal(message["id"], message["signal"])
        return None

    def _start(self, identity: int, spec: ProcessSpec) -> ProcessSpec | None:
        try:
            os.makedirs(os.path.dirname(spec.log_path), exist_ok=True)
            log = os.open(spec.log_path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            self._send({"id": identity, "error": f"cannot open the log {spec.log_path!r}: {error.strerror}"})
            return None
        pid = os.fork()
        if pid == 0:
            self._enter_child(spec, log)
            return dataclasses.replace(spec, is_forked=spec.is_forked and self._can_fork)
        os.close(log)
        self._children[pid] = identity
        if path := spec.env.get(RENDEZVOUS_VARIABLE):
            self._files.add(path)
        self._send({"id": identity, "pid": pid})
        return None

    def _enter_child(self, spec: ProcessSpec, log: int) -> None:
        self._dies_with_server()
        os.setsid()
        self._guard.enter_child()
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.close(log)
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        self._channel.close()
        os.close(self._wakeup_read)
        os.close(self._wakeup_write)
        os.chdir(spec.working_dir)
        if spec.cores:
            os.sched_setaffinity(0, spec.cores)

    def _signal(self, identity: int, number: int) -> None:
        # Not yet reaped, so the id cannot belong to anybody else. TERM is for the process itself, which may have
        # helpers that it ends in its own order; KILL is for the whole group.
        for pid, owner in self._children.items():
            if owner == identity:
                if number == signal.SIGKILL:
                    _kill_group(pid)
                else:
                    os.kill(pid, number)

    def _reap(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.read(self._wakeup_read, 4096)
        while True:
            try:
                # Without reaping: the zombie keeps the id of its group from being used again.
                ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            except ChildProcessError:
                return
            if ended is None:
                return
            identity = self._children.pop(ended.si_pid, None)
            if identity is not None:
                _kill_group(ended.si_pid)
                self._guard.forget(ended.si_pid)
            _, status = os.waitpid(ended.si_pid, 0)
            if identity is not None:
                self._send({"id": identity, "exit": os.waitstatus_to_exitcode(status)})

    def _end_children(self) -> None:
        for pid in self._children:
            _kill_group(pid)
        deadline = time.monotonic() + _REAP_TIMEOUT_S
        with contextlib.suppress(ChildProcessError):
            while self._children and time.monotonic() < deadline:
                pid, _ = os.waitpid(-1, os.WNOHANG)
                self._children.pop(pid, None)
                if pid == 0:
                    time.sleep(0.01)
        for path in self._files:
            with contextlib.suppress(OSError):
                os.unlink(path)

    def _send(self, message: dict[str, Any]) -> None:
        self._channel.sendall(encode(message))


def preload(modules: Sequence[str]) -> dict[str, str]:
    """Import ``modules``; returns the traceback of each that failed.

    A failure is not fatal: the task that needs the module meets it again, with the traceback in its log.
    """
    failures: dict[str, str] = {}
    for name in modules:
        try:
            importlib.import_module(name)
        except Exception:
            failures[name] = traceback.format_exc()
    gc.collect()
    # Objects that no collection visits keep their pages shared with every child.
    gc.freeze()
    return failures


def run_child(spec: ProcessSpec) -> None:
    """In a new child: become ``spec``, like ``python -m module``."""
    if not spec.is_forked:
        command = interpreter_command(spec)
        paths = [*spec.env.get("PYTHONPATH", "").split(os.pathsep), added_import_path(sys.path)]
        added = {"PYTHONUNBUFFERED": "1", "PYTHONPATH": os.pathsep.join(path for path in paths if path)}
        os.execve(command[0], command, {**spec.env, **added})
    os.environ.clear()
    os.environ.update(spec.env)
    for stream in (sys.stdout, sys.stderr):
        # Whole lines: several processes append to one log.
        stream.reconfigure(line_buffering=True, write_through=False)  # pyright: ignore[reportAttributeAccessIssue]
    _refresh_libraries(spec.num_threads)
    sys.argv = [spec.module, *spec.arguments]
    atexit.register(_end_log)  # the first to be registered is the last to be called
    runpy.run_module(spec.module, run_name="__main__", alter_sys=True)


def _end_log() -> None:
    # Libraries list what they leak when the interpreter is gone (nanobind does, for triton): dozens of lines after the
    # one that says why a task failed, and the end of a log is what people are shown.
    sys.stderr.flush()
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


def _refresh_libraries(num_threads: int) -> None:
    # What a library did when it was loaded, or keeps per process, is inherited: thread counts (a pool of the parent
    # would not exist here, and waiting for it hangs) and numpy's random state (the same in every child).
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.set_num_threads(num_threads)
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        numpy.random.seed()


def _kill_when_closed(read_end: int) -> None:
    groups: set[int] = set()
    with open(read_end, encoding="ascii") as lines:
        for line in lines:
            (groups.add if line[0] == "+" else groups.discard)(int(line[1:]))
    for group in groups:
        _kill_group(group)


def _kill_group(pid: int) -> None:
    # The child may not have made its session yet: then only the process itself is there.
    for kill in (os.killpg, os.kill):
        with contextlib.suppress(ProcessLookupError):
            kill(pid, signal.SIGKILL)


def _ignore_signal(number: int, frame: object) -> None:
    del number, frame


def main(arguments: Sequence[str]) -> None:
    """Run the server, and every child that it forks.

    Args:
        arguments: File descriptor of the channel, process id of the client, and the modules to preload.
    """
    descriptor, parent_pid, *modules = arguments
    guard = Guard(int(descriptor))
    server = Server(socket.socket(fileno=int(descriptor)), int(parent_pid), guard)
    failures = preload(modules)
    spec: ProcessSpec | None = None
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        server.announce(failures)
        spec = server.serve()
    if spec is not None:
        # With the server's frames gone, exit codes, tracebacks and atexit work as in any interpreter.
        run_child(spec)


if __name__ == "__main__":
    main(sys.argv[1:])
