"""Errors that a caller can cause and repair: what is wrong, what was got, what is allowed, what to do."""

from collections.abc import Sequence


class MoeError(ValueError):
    """A value handed to this library cannot be used; the text names the value, what is allowed and the remedy."""

    def __init__(self, what: str, *, got: object, allowed: str, remedy: str) -> None:
        super().__init__(f"{what}: got {got}; allowed: {allowed}; {remedy}")


def check_range(name: str, value: float, *, low: float, high: float = float("inf"), remedy: str = "") -> None:
    """Refuse a number outside ``[low, high]``.

    Args:
        name: What the number is, as the caller knows it.
        value: The number.
        low: Least allowed value.
        high: Greatest allowed value.
        remedy: What to do instead.

    Raises:
        MoeError: If ``value`` is outside.
    """
    if low <= value <= high:
        return
    allowed = f"at least {low}" if high == float("inf") else f"{low} to {high}"
    raise MoeError(name, got=value, allowed=allowed, remedy=remedy or f"choose {name} in that range")


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """Refuse a name that is not in a list.

    Args:
        name: What is being chosen.
        value: The choice.
        choices: What may be chosen.

    Raises:
        MoeError: If ``value`` is not among ``choices``.
    """
    if value not in choices:
        raise MoeError(name, got=repr(value), allowed=", ".join(choices), remedy="choose one of these")
