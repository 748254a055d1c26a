"""How far a preparation is: a live line on a terminal, at most one plain line per ten seconds elsewhere."""

import time
from typing import TYPE_CHECKING

from rich.console import Console

if TYPE_CHECKING:
    from rich.status import Status

_SECONDS_BETWEEN_LINES = 10.0


class ProgressLine:
    """Shows one changing line of text; use as a context manager."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console()
        self._status: Status | None = None
        self._last = time.monotonic()

    def __enter__(self) -> "ProgressLine":
        if self._console.is_terminal:
            self._status = self._console.status("preparing")
            self._status.start()
        return self

    def show(self, text: str) -> None:
        """Replace the line by ``text`` (plain, no markup)."""
        if self._status is not None:
            self._status.update(text.replace("[", r"\["))
        elif time.monotonic() - self._last >= _SECONDS_BETWEEN_LINES:
            self._last = time.monotonic()
            self.say(text)

    def say(self, text: str) -> None:
        """Print a line that stays; for the few that must be seen."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def __exit__(self, *_: object) -> None:
        if self._status is not None:
            self._status.stop()
