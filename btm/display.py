"""Live progress of all running tasks: a table with bars on a terminal, plain lines in a batch log.

The workers' ``metrics.jsonl`` files are the only source; they are followed, not re-read, so that looking ten times a
second at a hundred tasks costs a hundred ``stat`` calls. A log that is not a terminal gets no control character and,
with many tasks, fewer than one progress line per third of the interval.
"""

import os
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from btm.metrics import MetricsTail, Row, is_dev_row, number, update_of
from btm.tables import format_count, format_duration, plain

_FRAMES_PER_S = 4
_TASKS_PER_INTERVAL = 3
_FRAME_LINES = 6
"""Lines of a terminal that are left to messages and the table's head."""
_ACTIVE = ("failed", "running", "restarting", "cancelled")
"""States that are always worth a line, in this order."""
_NOT_BEGUN = ("waiting", "queued")
_FINISHED = ("done", "succeeded")
_STATE_STYLES = {"running": "cyan", "failed": "bold red", "restarting": "yellow", "cancelled": "yellow"}


@dataclass(frozen=True, slots=True)
class TaskView:
    """What the driver knows of a task."""

    name: str
    state: str
    """waiting (or queued), running, restarting, done (or succeeded), failed, skipped, cancelled."""
    metrics_path: Path | None
    """Of the worker; None for tasks without metrics."""
    total_updates: int | None
    """Updates of this task alone."""
    total_tokens: int | None
    """Tokens of this task alone."""
    note: str = ""
    """Shown beside it: a restart, the reason of a failure."""
    first_update: int = 0
    """Updates that its parent had done: the task's metric rows count on from there."""


@dataclass(slots=True)
class Progress:
    """What the metrics of a task say."""

    update: int | None = None
    tokens: float | None = None
    loss: float | None = None
    tokens_per_s: float | None = None
    seconds_left: float | None = None

    def take(self, rows: Sequence[Row], view: TaskView) -> None:
        """Bring the figures up to date with new training rows, oldest first."""
        for row in rows:
            update, tokens = update_of(row), number(row, "tokens")
            if update is None or is_dev_row(row):
                continue
            per_update = self._tokens_per_update(update, tokens, view)
            self.update, self.tokens = update, tokens
            self.loss = number(row, "train/loss")
            self.tokens_per_s = number(row, "train/tokens_per_s")
            self.seconds_left = None
            if view.total_updates is not None and per_update and self.tokens_per_s:
                left = max(0, view.first_update + view.total_updates - update)
                self.seconds_left = left * per_update / self.tokens_per_s

    def _tokens_per_update(self, update: int, tokens: float | None, view: TaskView) -> float | None:
        if tokens is None:
            return None
        if self.update is not None and self.tokens is not None and update > self.update:
            return (tokens - self.tokens) / (update - self.update)
        return tokens / (update - view.first_update) if update > view.first_update else None


class RunDisplay:
    """Context manager that shows the tasks of a run.

    Args:
        console: Where to; None is stderr.
        log_interval_s: Seconds between two progress lines of a task where there is no terminal.
        clock: Seconds, monotonic.
    """

    def __init__(
        self,
        console: Console | None = None,
        log_interval_s: float = 30.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._console = console or Console(stderr=True)
        self._log_interval_s = log_interval_s
        self._clock = clock
        self._tails: dict[tuple[str, Path], MetricsTail] = {}
        self._progress: dict[str, Progress] = {}
        self._printed_at: dict[str, float] = {}
        self._states: dict[str, str] = {}
        self._views: Sequence[TaskView] = ()
        self._live: Live | None = None
        self._next_frame = 0.0

    def __enter__(self) -> "RunDisplay":
        if _is_live(self._console):
            live = Live(console=self._console, auto_refresh=False, redirect_stdout=False)
            live.start()
            self._live = live
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.update(self._frame(), refresh=True)
            self._live.stop()
            self._live = None

    def update(self, views: Sequence[TaskView]) -> None:
        """Show the tasks as they stand; cheap enough to be called several times a second."""
        self._views = views
        for view in views:
            self._follow(view)
        now = self._clock()
        if self._live is not None:
            if now >= self._next_frame:
                self._next_frame = now + 1 / _FRAMES_PER_S
                self._live.update(self._frame(), refresh=True)
            return
        running = sum(view.state == "running" for view in views)
        interval = self._log_interval_s * max(1.0, running / _TASKS_PER_INTERVAL)
        for view in views:
            self._print_line(view, now, interval)

    def log(self, message: str) -> None:
        """Print a message above the table, or as plain lines."""
        for line in message.splitlines():
            self._console.print(Text(plain(line)), soft_wrap=True)

    def _follow(self, view: TaskView) -> None:
        progress = self._progress.setdefault(view.name, Progress())
        if view.metrics_path is not None and view.state not in _NOT_BEGUN:
            key = (view.name, view.metrics_path)
            tail = self._tails.setdefault(key, MetricsTail(view.metrics_path))
            progress.take(tail.read(), view)

    def _print_line(self, view: TaskView, now: float, interval: float) -> None:
        changed = view.state not in _NOT_BEGUN and self._states.get(view.name) != view.state
        self._states[view.name] = view.state
        due = view.state == "running" and now - self._printed_at.get(view.name, now) >= interval
        if changed or view.name not in self._printed_at:
            self._printed_at[view.name] = now
        if not changed and not due:
            return
        self._printed_at[view.name] = now
        facts = [f"{view.name}: {view.state}", *self._facts(view)]
        stamp = time.strftime("%H:%M:%S")
        self._console.print(Text(f"[{stamp}] {plain(', '.join(facts))}"), soft_wrap=True)

    def _facts(self, view: TaskView) -> list[str]:
        progress, facts = self._progress[view.name], []
        if progress.update is not None:
            facts.append(f"{_of(str(max(0, progress.update - view.first_update)), view.total_updates)} updates")
        if progress.tokens is not None:
            total = None if view.total_tokens is None else format_count(view.total_tokens)
            facts.append(f"{_of(format_count(progress.tokens), total)} tokens")
        if progress.loss is not None:
            facts.append(f"loss {progress.loss:.3f}")
        if view.state == "running" and progress.tokens_per_s is not None:
            facts.append(f"{format_count(progress.tokens_per_s)} tokens/s")
        if view.state == "running" and progress.seconds_left is not None:
            facts.append(f"{format_duration(progress.seconds_left)} left")
        return [*facts, view.note] if view.note else facts

    def _frame(self) -> RenderableType:
        worth = [view for view in self._views if view.metrics_path is not None or view.state in _ACTIVE]
        ranked = sorted(worth, key=lambda view: _rank(view.state))
        room = max(3, self._console.height - _FRAME_LINES)
        shown = ranked if len(ranked) <= room else ranked[: room - 1]
        table = Table(box=None, padding=(0, 1, 0, 0), header_style="bold", expand=True)
        table.add_column("task", overflow="ellipsis", no_wrap=True, min_width=8, ratio=2)
        table.add_column("state", no_wrap=True)
        table.add_column("", ratio=2, min_width=6)
        for heading in ("updates", "tokens", "loss", "tokens/s", "left"):
            table.add_column(heading, justify="right", no_wrap=True)
        with_notes = any(view.note for view in shown)
        if with_notes:
            table.add_column("", overflow="ellipsis", no_wrap=True, ratio=2)
        for view in shown:
            table.add_row(*self._cells(view), *([Text(plain(view.note))] if with_notes else []))
        counts = Counter(view.state for view in self._views)
        total = ", ".join(f"{count} {state}" for state, count in counts.items())
        hidden = f" ({len(ranked) - len(shown)} not shown)" if len(shown) < len(ranked) else ""
        return Group(table, Text(plain(f"{len(self._views)} tasks: {total}{hidden}"), style="dim"))

    def _cells(self, view: TaskView) -> list[RenderableType]:
        progress = self._progress.get(view.name, Progress())
        running = view.state == "running"
        return [
            Text(plain(view.name)),
            Text(plain(view.state), style=_STATE_STYLES.get(view.state, "dim")),
            _bar(view, progress),
            ""
            if progress.update is None
            else _of(str(max(0, progress.update - view.first_update)), view.total_updates),
            "" if progress.tokens is None else format_count(progress.tokens),
            "" if progress.loss is None else f"{progress.loss:.3f}",
            format_count(progress.tokens_per_s) if running and progress.tokens_per_s is not None else "",
            format_duration(progress.seconds_left) if running and progress.seconds_left is not None else "",
        ]


def _is_live(console: Console) -> bool:
    # FORCE_COLOR makes rich call a file a terminal; a batch log must stay plain all the same.
    if os.environ.get("FORCE_COLOR") and not console.file.isatty():
        return False
    return console.is_terminal and not console.is_dumb_terminal


def _bar(view: TaskView, progress: Progress) -> RenderableType:
    if view.state in _FINISHED:
        return ProgressBar(total=1, completed=1)
    if not view.total_updates or progress.update is None:
        return ""
    return ProgressBar(total=view.total_updates, completed=max(0, progress.update - view.first_update))


def _of(done: str, total: int | str | None) -> str:
    return done if total is None else f"{done}/{total}"


def _rank(state: str) -> int:
    order = (*_ACTIVE, *_NOT_BEGUN)
    return order.index(state) if state in order else len(order)
