"""Uniform average: the plainest parameter average of Branch-Train-Merge (https://arxiv.org/abs/2208.03306)."""

from btm.merge.request import MergeRequest


def uniform_weights(request: MergeRequest) -> list[float]:
    """The same weight for every model."""
    return [1 / len(request.names)] * len(request.names)
