"""Broken documents: reported with file and line, counted by kind, and left out if ``data.on_error`` says so."""

from collections import Counter
from enum import StrEnum
from pathlib import Path

from btm.config_data import OnError
from btm.errors import DataError

_EXAMPLES = 3


class FaultKind(StrEnum):
    """What can be wrong with a document."""

    bad_json = "bad_json"
    missing_field = "missing_field"
    not_text = "not_text"
    bad_encoding = "bad_encoding"
    binary = "binary"
    empty = "empty"
    too_large = "too_large"
    empty_file = "empty_file"
    unreadable = "unreadable"
    bad_image = "bad_image"


class Faults:
    """Faults of one domain.

    Attributes:
        counts: Kind -> documents left out.
        examples: The first few faults, in words.
    """

    def __init__(self, domain: str, on_error: OnError) -> None:
        self.domain = domain
        self.counts: Counter[str] = Counter()
        self.examples: list[str] = []
        self._on_error = on_error

    def add(self, kind: FaultKind, path: Path, line: int | None, problem: str) -> None:
        """Count one fault.

        Args:
            kind: Its kind.
            path: File.
            line: Line or row, from 1; None for the file as a whole.
            problem: What is wrong, in words.

        Raises:
            DataError: If faults stop the preparation.
        """
        place = f"{path}:{line}" if line is not None else str(path)
        message = f"{place}: {problem}"
        if self._on_error is OnError.stop:
            raise DataError(
                f"domain {self.domain}: {message}; repair it, or leave such documents out with data.on_error=skip"
            )
        self.counts[str(kind)] += 1
        if len(self.examples) < _EXAMPLES:
            self.examples.append(message)

    @property
    def summary(self) -> str:
        """All faults in one sentence; empty when there are none."""
        if not self.counts:
            return ""
        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(self.counts.items()))
        return f"domain {self.domain}: left out {sum(self.counts.values())} documents ({kinds}); {self.examples[0]}"
