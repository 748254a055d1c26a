"""Tells, within a fraction of a millisecond, that a process has begun to write something: inotify on a whole tree."""

import ctypes
import os
import select
import struct
import time
from collections.abc import Iterator
from pathlib import Path

_CREATED = 0x100
_MOVED_HERE = 0x80
_IS_DIRECTORY = 0x40000000
_HEADER = struct.Struct("iIII")


class TreeWatch:
    """Yields the paths that appear below ``root``, also in directories that are made later."""

    def __init__(self, root: Path) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._descriptor = self._libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        assert self._descriptor >= 0
        self._directories: dict[int, str] = {}
        self._add(str(root))

    def close(self) -> None:
        os.close(self._descriptor)

    def wait(self, seconds: float) -> Iterator[Path]:
        """Paths that appear within ``seconds``, each as soon as it is there."""
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            if not select.select([self._descriptor], [], [], left)[0]:
                return
            data = os.read(self._descriptor, 1 << 16)
            while data:
                number, mask, _, length = _HEADER.unpack_from(data)
                name = data[_HEADER.size : _HEADER.size + length].rstrip(b"\0").decode()
                data = data[_HEADER.size + length :]
                if number not in self._directories:
                    continue
                path = os.path.join(self._directories[number], name)
                if mask & _IS_DIRECTORY:
                    self._add(path)
                yield Path(path)

    def _add(self, path: str) -> None:
        number = self._libc.inotify_add_watch(self._descriptor, os.fsencode(path), _CREATED | _MOVED_HERE)
        if number < 0:
            return
        self._directories[number] = path
        try:
            names = [entry.path for entry in os.scandir(path) if entry.is_dir(follow_symlinks=False)]
        except OSError:
            return
        for name in names:
            self._add(name)
