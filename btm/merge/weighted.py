"""Weighted average with weights that the user gives (https://arxiv.org/abs/2208.03306)."""

import math

from btm.errors import MergeError
from btm.merge.request import MergeRequest, normalised


def weighted_weights(request: MergeRequest) -> list[float]:
    """The given weights, normalised to 1; models that are not named get 0.

    Raises:
        MergeError: If a name is unknown, a weight is negative or not finite, or nothing is left.
    """
    unknown = sorted(set(request.weights) - set(request.names))
    if unknown:
        raise MergeError(f"weights name {unknown}, which are not among the models {list(request.names)}")
    weights = [float(request.weights.get(name, 0.0)) for name in request.names]
    if not all(math.isfinite(weight) and weight >= 0 for weight in weights) or not 0 < sum(weights) < math.inf:
        raise MergeError(f"weights must be finite, at least 0 and not all 0, got {dict(request.weights)}")
    return normalised(weights)
