"""What a merge method may look at when it weighs models."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from btm.errors import MergeError


@dataclass(frozen=True, kw_only=True, slots=True)
class MergeRequest:
    """Models to weigh, in manifest order, and the evidence about them."""

    names: Sequence[str]
    weights: Mapping[str, float] = field(default_factory=dict)
    """Given weights by name."""
    domain: str | None = None
    """Target domain."""
    score_dirs: Mapping[str, Path] = field(default_factory=dict)
    """Name -> directory with ``dev-<domain>.npz``."""
    loss_of: Callable[[Sequence[str]], float] | None = None
    """Dev loss (nats per token) of the uniform average of the named models."""

    def need_domain(self, method: str) -> str:
        """The target domain.

        Raises:
            MergeError: If none was given.
        """
        if self.domain is None:
            raise MergeError(f"method {method} needs a target domain, got none; set merge.domain")
        return self.domain


def normalised(weights: Sequence[float]) -> list[float]:
    """Weights divided by their sum."""
    total = sum(weights)
    return [weight / total for weight in weights]
