"""The closing table of a benchmark: each figure with its floor and goal; ``run_all.py`` collects them."""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

COLLECT = "BENCH_TABLE"
"""Environment variable: file to which every table's lines are appended as JSON."""


@dataclass(frozen=True, kw_only=True)
class Line:
    """One figure.

    Attributes:
        what: What was measured, and against what.
        figure: The measured value; None says that it could not be measured here.
        floor: Worst value that is good enough, if there is such a limit.
        goal: Value aimed at.
        at_most: Whether floor and goal are upper limits; otherwise more is better.
        unit: Of all three; ratios have none.
    """

    what: str
    figure: float | None
    floor: float | None = None
    goal: float | None = None
    at_most: bool = False
    unit: str = ""

    @property
    def verdict(self) -> str:
        """How far it got."""
        if self.figure is None:
            return "not measured"
        if self.goal is not None and self._reaches(self.goal):
            return "goal reached"
        if self.floor is None:
            return "" if self.goal is None else "below the goal"
        return "floor reached" if self._reaches(self.floor) else "BELOW THE FLOOR"

    def _reaches(self, limit: float) -> bool:
        assert self.figure is not None
        return self.figure <= limit if self.at_most else self.figure >= limit


def close(lines: Sequence[Line]) -> None:
    """Print the table and hand it to ``run_all.py``, if that is running."""
    print_table(lines)
    if path := os.environ.get(COLLECT):
        with Path(path).open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(asdict(line)) + "\n" for line in lines)


def print_table(lines: Sequence[Line]) -> None:
    """Print one row per line."""
    print(f"\n{'':64} {'figure':>10} {'floor':>12} {'goal':>12}")
    for line in lines:
        limits = [_shown(limit, line, limit=True) for limit in (line.floor, line.goal)]
        figure = _shown(line.figure, line)
        print(f"{line.what:<64} {figure:>10} {limits[0]:>12} {limits[1]:>12}  {line.verdict}", flush=True)


def collected(path: Path) -> list[Line]:
    """The lines that :func:`close` appended to ``path``."""
    if not path.exists():
        return []
    return [Line(**json.loads(text)) for text in path.read_text(encoding="utf-8").splitlines()]


def _shown(value: float | None, line: Line, *, limit: bool = False) -> str:
    if value is None:
        return "-"
    relation = ("<= " if line.at_most else ">= ") if limit else ""
    unit = f" {line.unit}" if line.unit else ""
    return f"{relation}{value:.4g}{unit}"
