"""What the workers that run in one short process have in common: a request from a file, errors as one line."""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from btm.errors import BtmError
from btm.requests import SpecModel

_Spec = TypeVar("_Spec", bound=SpecModel)


def run_spec_file(arguments: Sequence[str], kind: type[_Spec], work: Callable[[_Spec], object]) -> int:
    """Do ``work`` for the request in the file that a command line names.

    Args:
        arguments: Of the command line; the spec file alone.
        kind: What the file holds.
        work: Does it.

    Returns:
        The exit code: 0, that of the error, or 2 when the command line is wrong.
    """
    if len(arguments) != 1:
        print(f"expected one argument, the spec file, got {len(arguments)}", file=sys.stderr)  # noqa: T201
        return 2
    try:
        work(kind.load(Path(arguments[0])))
    except BtmError as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201
        return error.exit_code
    return 0
