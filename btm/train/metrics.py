"""The metrics file of a run: JSON lines, appended, and after any kill the same as without it."""

import json
import os
from pathlib import Path
from typing import Any

from btm.files import write_atomic


class MetricsFile:
    """Appends rows to ``metrics.jsonl``; each row is in the file, as a whole line, when :meth:`append` returns.

    Args:
        path: The file.
        last_update: Rows behind this update, and half a line of a killed writer, are dropped: the updates that they
            belong to are about to be done again.
    """

    def __init__(self, path: Path, *, last_update: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        _drop_rows(path, last_update)
        self._descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)

    def append(self, row: dict[str, Any]) -> None:
        """Write one row.

        Raises:
            OSError: If the disk is full; the file then ends with whole rows or one half row.
        """
        line = memoryview(json.dumps(row, allow_nan=False).encode() + b"\n")
        while line:
            line = line[os.write(self._descriptor, line) :]

    def sync(self) -> None:
        """Make all rows durable."""
        os.fsync(self._descriptor)

    def close(self) -> None:
        """Close the file."""
        os.close(self._descriptor)


def _drop_rows(path: Path, last_update: int) -> None:
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return
    kept = b"".join(line for line in content.splitlines(keepends=True) if _is_kept(line, last_update))
    if kept != content:
        write_atomic(path, kept)


def _is_kept(line: bytes, last_update: int) -> bool:
    if not line.endswith(b"\n"):
        return False
    try:
        row = json.loads(line)
    except ValueError:
        return False
    return isinstance(row, dict) and isinstance(row.get("update"), int) and row["update"] <= last_update
