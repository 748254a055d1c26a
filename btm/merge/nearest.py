"""The nearest model alone: the argmax of the domain posterior (Branch-Train-Merge, https://arxiv.org/abs/2208.03306)."""

from btm.merge.posterior import posterior_weights
from btm.merge.request import MergeRequest


def nearest_weights(request: MergeRequest) -> list[float]:
    """1 for the model with the largest mean posterior on the target domain's dev documents, 0 for the others.

    Raises:
        MergeError: If there is no target domain, or scores are missing, damaged, or of different documents.
    """
    posterior = posterior_weights(request)
    best = posterior.index(max(posterior))
    return [float(index == best) for index in range(len(posterior))]
