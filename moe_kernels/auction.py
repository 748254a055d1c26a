"""The published auction of BASE layers, for parity with models trained by it. `assign_balanced` is exact and faster.

Shapes: T tokens, E experts, C tokens per expert.
"""

import torch

from moe_kernels.errors import MoeError

_ROUNDS_WITH_HOLDING = 100
_EPSILON_PARTS = 50
_EPSILON_LEAST = 1e-4


def _check(scores_TE: torch.Tensor) -> None:
    num_tokens, num_experts = scores_TE.shape
    if num_experts < 2 or num_tokens == 0 or num_tokens % num_experts:
        raise MoeError(
            "tokens x experts of the auction",
            got=f"{num_tokens} x {num_experts}",
            allowed="at least two experts and a positive multiple of as many tokens",
            remedy='use method="exact", which takes any numbers',
        )


def _resolve(lists_EC: torch.Tensor, bids_ET: torch.Tensor) -> torch.Tensor:
    """One expert per token: the highest bidder of those that list it; tokens in no list fill what is free, in order."""
    num_experts, capacity = lists_EC.shape
    listed_ET = torch.zeros_like(bids_ET, dtype=torch.bool).scatter_(1, lists_EC, True)
    expert_T = torch.where(listed_ET, bids_ET, -torch.inf).argmax(0)
    is_free_T = ~listed_ET.any(0)
    counts_E = torch.bincount(expert_T[~is_free_T], minlength=num_experts)
    expert_T[is_free_T] = torch.repeat_interleave(
        torch.arange(num_experts, device=counts_E.device), capacity - counts_E
    )
    return expert_T


def _bid(value_ET: torch.Tensor, capacity: int, epsilon: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Each expert's most valued tokens ``(E, C)``, and its bids for them ``(E, T)``."""
    top_value, top_index = value_ET.topk(capacity + 1, dim=1)
    lists_EC = top_index[:, :capacity]
    lead_EC = top_value[:, :capacity] - top_value[:, capacity:] + epsilon
    return lists_EC, torch.zeros_like(value_ET).scatter_(1, lists_EC, lead_EC)


def assign_auction(scores_TE: torch.Tensor, *, num_rounds_max: int = 1000) -> torch.Tensor:
    """Assign by the auction of Lewis et al. 2021 (https://arxiv.org/abs/2103.16716) as their released operator does.

    Experts bid for their best tokens; a token goes to the highest bidder and its price rises by the bid. A bid is the
    value's lead over the first token not bid for, plus ``epsilon``, a fiftieth of the range of the scores. After 100
    rounds experts no longer hold on to what they won, which ends sooner and is worse. Unlike the released operator this
    one always returns an assignment: tokens that no expert ended up with fill the places left.

    Args:
        scores_TE: Affinities ``(T, E)``; what is not finite counts as the smallest finite score.
        num_rounds_max: Rounds after which the places left are filled in order.

    Returns:
        Expert id per token ``(T,)``, int64, each id ``T / E`` times.

    Raises:
        MoeError: If ``T`` is not a positive multiple of ``E`` or ``E < 2``.
    """
    _check(scores_TE)
    num_tokens, num_experts = scores_TE.shape
    capacity = num_tokens // num_experts
    scores_ET = scores_TE.detach().to(torch.float32).t().contiguous()
    finite_ET = torch.isfinite(scores_ET)
    if not bool(finite_ET.all()):
        low = scores_ET[finite_ET].min() if bool(finite_ET.any()) else scores_ET.new_zeros(())
        scores_ET = torch.where(finite_ET, scores_ET, low)
    high, low = scores_ET.max(), scores_ET.min()
    epsilon = max(float(high - low) / _EPSILON_PARTS, _EPSILON_LEAST)
    price_T = scores_ET.new_zeros(num_tokens)
    value_ET = scores_ET.clone()
    lists_EC, bids_ET = _bid(value_ET, capacity, epsilon)
    for round_index in range(num_rounds_max):
        bid_T, holder_T = bids_ET.max(0)
        won_T = (bid_T > 0).nonzero().squeeze(1)
        if len(won_T) == num_tokens:
            break
        won = (holder_T[won_T], won_T)
        is_holding = round_index + 1 < _ROUNDS_WITH_HOLDING
        price_T += bid_T
        value_ET = scores_ET - price_T
        value_ET[won] = high if is_holding else scores_ET[won]
        lists_EC, bids_ET = _bid(value_ET, capacity, epsilon)
        if is_holding:  # what an expert won it holds by the least bid, so that its price rises slowly
            bids_ET[won] = epsilon
    return _resolve(lists_EC, bids_ET)
