"""Keys ``merge.*``: how weights are averaged."""

from enum import StrEnum

from pydantic import Field

from btm.schema import Model


class MergeMethodName(StrEnum):
    """Ways to average weights."""

    uniform = "uniform"
    weighted = "weighted"
    posterior = "posterior"
    nearest = "nearest"
    greedy_soup = "greedy_soup"


class MergeConfig(Model):
    """How ``btm merge`` combines the ELMs of a forest into one model."""

    method: MergeMethodName = MergeMethodName.uniform
    """Name in the table of methods."""
    weights: dict[str, float] = {}
    """Weights per ELM for ``weighted``; normalised to 1."""
    domain: str | None = None
    """Target domain whose dev documents give the weights of ``posterior`` and judge ``greedy_soup``."""
    elms: list[str] = []
    """ELMs to take; empty takes all."""
    output: str | None = None
    """Directory to write; null is ``<forest>/merged/<method>``."""
    memory_bytes: int = Field(default=64 << 20, ge=1 << 20)
    """Private memory that streaming may take."""
