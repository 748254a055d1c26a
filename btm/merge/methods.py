"""The one table of merge methods. A method is a function from a request to one weight per model, in its own file.

To add one: a file with the function, its name in ``MergeMethodName``, one line here and one in ``configs/merge``.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from btm.config_merge import MergeMethodName
from btm.merge.greedy_soup import greedy_soup_weights
from btm.merge.nearest import nearest_weights
from btm.merge.posterior import posterior_weights
from btm.merge.request import MergeRequest
from btm.merge.uniform import uniform_weights
from btm.merge.weighted import weighted_weights


@dataclass(frozen=True, kw_only=True, slots=True)
class MergeMethod:
    """A way to weigh models before they are averaged."""

    title: str
    reference: str
    """URL of the paper that defines the method."""
    summary: str
    """One sentence for the model card."""
    weigh: Callable[[MergeRequest], list[float]]
    """Weights in the order of ``request.names``: at least 0, not all 0; the engine normalises them."""


MERGE_METHODS: Mapping[MergeMethodName, MergeMethod] = {
    MergeMethodName.uniform: MergeMethod(
        title="Uniform average",
        reference="https://arxiv.org/abs/2208.03306",
        summary="Every model has the same weight.",
        weigh=uniform_weights,
    ),
    MergeMethodName.weighted: MergeMethod(
        title="Weighted average",
        reference="https://arxiv.org/abs/2208.03306",
        summary="The weights were given.",
        weigh=weighted_weights,
    ),
    MergeMethodName.posterior: MergeMethod(
        title="Posterior-weighted average",
        reference="https://arxiv.org/abs/2208.03306",
        summary="Each weight is the mean posterior of the model's domain over the target domain's dev documents.",
        weigh=posterior_weights,
    ),
    MergeMethodName.nearest: MergeMethod(
        title="Nearest model",
        reference="https://arxiv.org/abs/2208.03306",
        summary="The one model with the largest mean posterior on the target domain's dev documents.",
        weigh=nearest_weights,
    ),
    MergeMethodName.greedy_soup: MergeMethod(
        title="Greedy soup",
        reference="https://arxiv.org/abs/2203.05482",
        summary="Models were added in the order of their dev loss while the average's dev loss did not rise.",
        weigh=greedy_soup_weights,
    ),
}
"""Name -> method."""
