"""The end of a log, fit to be shown in an error message."""

import re
import unicodedata
from pathlib import Path

_TAIL_BYTES = 1 << 16
_MAX_LINE_CHARACTERS = 500
_ESCAPE_SEQUENCE = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)?|[@-Z\\^_])")


def end_of_log(path: Path, lines: int = 20, *, start: int = 0) -> str:
    """Last lines of a log that are not blank.

    Terminal escape sequences and control characters are removed (a log may hold anything), of a line that a progress
    bar overwrote only the last state is kept, and long lines are cut.

    Args:
        path: The log; a missing or unreadable one gives the empty text.
        lines: Most lines to return.
        start: Bytes to pass over, for example what an earlier attempt has written.
    """
    try:
        with open(path, "rb") as file:
            size = file.seek(0, 2)
            file.seek(max(0, start, size - _TAIL_BYTES))
            data = file.read(_TAIL_BYTES)
    except OSError:
        return ""
    cleaned = [_clean_line(line) for line in data.decode("utf-8", "replace").split("\n")]
    shown = [line for line in cleaned if line.strip()]
    return "\n".join(shown[max(0, len(shown) - lines) :])


def _clean_line(line: str) -> str:
    last_state = _ESCAPE_SEQUENCE.sub("", line).rstrip("\r").rpartition("\r")[2]
    # Category C: control, format (such as marks that reverse the direction of text), surrogates, unassigned.
    text = "".join(c for c in last_state.replace("\t", "    ") if not unicodedata.category(c).startswith("C"))
    return text if len(text) <= _MAX_LINE_CHARACTERS else text[:_MAX_LINE_CHARACTERS] + " ..."
