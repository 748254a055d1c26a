"""Reading of ``metrics.jsonl`` while a worker still writes it.

Workers append one JSON object per line and are the only source of truth; progress bars, trackers and reports read the
same file. A kill can leave half a line, and a worker that continues from its checkpoint repeats the updates since then:
:class:`MetricsTail` gives whole rows only, and :func:`latest_rows` keeps the last row of every update.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Row = dict[str, Any]

_READ_BYTES = 1 << 20


class MetricsTail:
    """Follows one metrics file and gives only what is new; costs one ``stat`` while nothing is.

    Args:
        path: The file; it need not exist yet. When it is replaced or cut, reading starts over.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.broken_lines = 0
        """Lines that were no JSON object (a writer was killed in the middle)."""
        self._offset = 0
        self._inode = 0

    def read(self) -> list[Row]:
        """Rows completed since the last call, in file order."""
        try:
            status = self.path.stat()
        except OSError:
            return []
        if status.st_ino != self._inode or status.st_size < self._offset:
            self._inode, self._offset = status.st_ino, 0
        if status.st_size == self._offset:
            return []
        rows: list[Row] = []
        with open(self.path, "rb") as file:
            file.seek(self._offset)
            rest = b""
            while chunk := file.read(_READ_BYTES):
                *lines, rest = (rest + chunk).split(b"\n")
                self._offset += sum(len(line) + 1 for line in lines)
                rows.extend(row for line in lines if (row := self._parse(line)) is not None)
        return rows

    def _parse(self, line: bytes) -> Row | None:
        # A line that continues half a line of a killed writer: the whole object is behind the last '{"update"'.
        for text in (line, line[line.rfind(b'{"update"') :] if b'{"update"' in line else b""):
            try:
                row = json.loads(text)
            except (ValueError, RecursionError):
                continue
            if isinstance(row, dict):
                return row
        self.broken_lines += bool(line.strip())
        return None


def is_dev_row(row: Row) -> bool:
    """Whether ``row`` holds dev losses (``eval/<domain>/loss``) and not training metrics."""
    return any(key.startswith("eval/") for key in row)


def update_of(row: Row) -> int | None:
    """The update that ``row`` belongs to; None when it names none."""
    update = row.get("update")
    return update if isinstance(update, int) and not isinstance(update, bool) else None


def number(row: Row, key: str) -> float | None:
    """A finite number of ``row``, or None."""
    value = row.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if abs(value) < float("inf") else None


def latest_rows(rows: Iterable[Row]) -> list[Row]:
    """Training and dev rows ordered by update, one each per update: the one written last."""
    kept: dict[tuple[int, bool], Row] = {}
    for row in rows:
        update = update_of(row)
        if update is not None:
            kept[update, is_dev_row(row)] = row
    return [kept[key] for key in sorted(kept)]
