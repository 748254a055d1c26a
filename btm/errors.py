"""Errors that a user can cause and repair. Each message names the value, what is allowed and the remedy.

The command line prints these without a traceback and exits with ``exit_code``; any other exception is our own bug
and keeps its traceback.
"""

from collections.abc import Sequence


class BtmError(ValueError):
    """Base of every error that the user can repair."""

    exit_code = 1


class ConfigError(BtmError):
    """One or more values of the configuration are wrong; all of them are listed together."""

    exit_code = 2

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = tuple(problems)
        count = len(self.problems)
        head = "the configuration has a problem:" if count == 1 else f"the configuration has {count} problems:"
        super().__init__("\n".join([head, *(f"  - {problem}" for problem in self.problems)]))


class DataError(BtmError):
    """Text, tokenizer or token shards cannot be used as they are."""


class ForestError(BtmError):
    """The forest directory does not allow what was asked of it."""


class CheckpointError(BtmError):
    """No undamaged checkpoint fits what was asked."""


class MergeError(BtmError):
    """The given models cannot be averaged."""


class EnsembleError(BtmError):
    """The given models cannot be mixed."""


class TrainingError(BtmError):
    """Training cannot go on: too many bad steps, a full disk, a lost rank."""


class RunError(BtmError):
    """One or more steps of a run failed for good; the forest stays valid without them."""
