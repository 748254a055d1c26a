"""Greedy soup (Model soups, https://arxiv.org/abs/2203.05482, recipe 1), judged by dev loss instead of accuracy."""

import math

from btm.errors import MergeError
from btm.merge.request import MergeRequest


def greedy_soup_weights(request: MergeRequest) -> list[float]:
    """Equal weights of the models that the soup keeps, 0 for the others.

    Models are sorted by their own dev loss (ties in manifest order); each in turn joins the soup when the loss of the
    average does not rise, so the soup is never worse on dev than the best model.

    Raises:
        MergeError: If there is no target domain, no judge, or a single model's loss is not finite.
    """
    domain = request.need_domain("greedy_soup")
    if request.loss_of is None:
        raise MergeError(f"method greedy_soup needs dev documents of {domain!r} to judge averages, got none")
    losses = [request.loss_of([name]) for name in request.names]
    for name, loss in zip(request.names, losses, strict=True):
        if not math.isfinite(loss):
            raise MergeError(f"model {name!r} has loss {loss} on dev-{domain}; leave it out or train it again")
    ranked = sorted(range(len(losses)), key=lambda index: losses[index])
    kept, best = [ranked[0]], losses[ranked[0]]
    for index in ranked[1:]:
        candidate = sorted([*kept, index])
        loss = request.loss_of([request.names[i] for i in candidate])
        # A NaN compares false, so a broken average never joins.
        if loss <= best:
            kept, best = candidate, loss
    return [1 / len(kept) if index in kept else 0.0 for index in range(len(losses))]
