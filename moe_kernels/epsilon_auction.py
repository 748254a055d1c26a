"""Balanced assignment by an auction with epsilon scaling: whole numbers, all tokens at once, made for GPUs.

Scores become whole numbers of ``2**24`` levels over their range. In a round every token without an expert bids for
the one with the highest score minus price: up to the price at which its second choice would be as good, plus epsilon.
Each expert keeps its highest bids, as many as it has places; its price is the lowest bid it keeps. A phase ends when
every token has an expert; then epsilon shrinks and the next phase starts from the prices found (Bertsekas 1988;
Bertsekas and Castanon 1989, "The auction algorithm for the transportation problem").

Where T is no multiple of E, every expert has ``ceil(T/E)`` places and the spare ones go to idle bidders, at most one
per expert, which look at prices only.

Guarantee of a finished auction, whose last epsilon is one level: the total is at most ``2 * T + E`` levels below the
best, one for the epsilon of each bidder and one for the rounding of each token's scores; a level is 6e-8 of the range
of the scores. `Auction.gap` is measured from the prices and usually far smaller.

Shapes: T tokens, E experts.
"""

from dataclasses import dataclass
from typing import Protocol

import torch

LEVELS = 2**24
_FIRST_EPSILON = LEVELS >> 3
_WARM_EPSILON = LEVELS >> 12
_SHRINK = 8
_PRICE_MAX = 2**30
_ROUNDS_PER_LOOK = 8


@dataclass(kw_only=True)
class AuctionState:
    """Where an auction stands; rounds change it in place."""

    score_TE: torch.Tensor
    """Scores ``(T, E)`` in levels, int32."""
    price_E: torch.Tensor
    """Lowest bid that each full expert keeps ``(E,)``, int32."""
    expert_T: torch.Tensor
    """Expert that holds each token ``(T,)``, int32; -1 for none."""
    bid_T: torch.Tensor
    """What the token bid for it ``(T,)``, int32."""
    idle_E: torch.Tensor
    """Bid of the idle bidder at each expert ``(E,)``, int32; -1 for none."""
    num_idle: int
    """Idle bidders there are."""
    places: int
    """Places of each expert, ``ceil(T/E)``."""


@dataclass(frozen=True, kw_only=True)
class Auction:
    """What an auction found."""

    expert_T: torch.Tensor
    """Expert id per token ``(T,)``, int64; -1 where the rounds did not suffice."""
    price_E: torch.Tensor
    """Prices ``(E,)`` in the unit of the scores, float64."""
    gap: torch.Tensor
    """The total of a finished auction is at most this far below the best, a scalar in the unit of the scores."""
    num_rounds: int
    is_finished: bool
    """Whether every token has an expert and every phase ended."""


class Rounds(Protocol):
    """One round on a state: bids of tokens without an expert, then what each expert keeps."""

    def __call__(self, state: AuctionState, epsilon: int) -> None:
        """Change the state."""
        ...


def round_in_torch(state: AuctionState, epsilon: int) -> None:
    """The reference of a round.

    Args:
        state: Changed in place.
        epsilon: By how many levels a bid exceeds what the second choice makes it worth.
    """
    num_tokens, num_experts = state.score_TE.shape
    free_N = (state.expert_T < 0).nonzero().squeeze(1)
    value_NE = state.score_TE[free_N] - state.price_E
    top_N = value_NE.amax(1)
    turn_NE = (torch.arange(num_experts, device=free_N.device) - free_N.unsqueeze(1)).remainder(num_experts)
    first_N = torch.where(value_NE == top_N.unsqueeze(1), turn_NE, num_experts).argmin(1)  # ties go round by token
    second_N = value_NE.scatter(1, first_N.unsqueeze(1), -(2**31)).amax(1)
    state.expert_T[free_N] = first_N.int()
    state.bid_T[free_N] = (state.price_E[first_N] + top_N - second_N + epsilon).int()
    idle_N = (state.idle_E >= 0).nonzero().squeeze(1)
    expert_M = torch.cat([state.expert_T.long(), idle_N])
    bid_M = torch.cat([state.bid_T, state.idle_E[idle_N]])
    order_M = torch.argsort(bid_M, descending=True, stable=True)
    order_M = order_M[torch.argsort(expert_M[order_M], stable=True)]
    count_E = torch.bincount(expert_M, minlength=num_experts)
    rank_M = torch.arange(order_M.numel(), device=order_M.device) - (count_E.cumsum(0) - count_E)[expert_M[order_M]]
    last = order_M[rank_M == state.places - 1]
    state.price_E[expert_M[last]] = bid_M[last]
    lost = order_M[rank_M >= state.places]
    state.expert_T[lost[lost < num_tokens]] = -1
    state.idle_E[idle_N[lost[lost >= num_tokens] - num_tokens]] = -1


def _bid_idle(state: AuctionState, epsilon: int) -> None:
    """Those of the idle bidders without a place take the cheapest ones, all at the price of the next cheapest."""
    missing = state.num_idle - (state.idle_E >= 0).sum()
    cost_E = torch.where(state.idle_E >= 0, state.idle_E, state.price_E)
    sorted_E, order_E = cost_E.sort(stable=True)
    rank_E = torch.empty_like(order_E).scatter_(0, order_E, torch.arange(order_E.numel(), device=order_E.device))
    level = sorted_E.index_select(0, missing.view(1)) + epsilon
    state.idle_E.copy_(torch.where(rank_E < missing, level, state.idle_E))


def _is_settled(state: AuctionState) -> bool:
    is_placed = (state.expert_T >= 0).all() & ((state.idle_E >= 0).sum() == state.num_idle)
    return bool(is_placed)


def _phase(state: AuctionState, epsilon: int, rounds: Rounds, num_rounds_max: int) -> tuple[int, bool]:
    state.expert_T.fill_(-1)
    state.idle_E.fill_(-1)
    state.price_E -= state.price_E.min()
    rounds_per_look = _ROUNDS_PER_LOOK if state.score_TE.is_cuda else 1  # a look makes the host wait for the device
    for count in range(1, num_rounds_max + 1):
        if state.num_idle:
            _bid_idle(state, epsilon)
        rounds(state, epsilon)
        if count == 1 or count % rounds_per_look == 0:
            if _is_settled(state):
                return count, True
            if int(state.price_E.max()) > _PRICE_MAX:
                return count, False
    return num_rounds_max, False


def _epsilons(first: int) -> list[int]:
    values = [first]
    while values[-1] > 1:
        values.append(max(1, values[-1] // _SHRINK))
    return values


def _gap(state: AuctionState) -> torch.Tensor:
    """Levels between the total and the dual at the prices, which no assignment exceeds."""
    num_tokens, num_experts = state.score_TE.shape
    floor, room = divmod(num_tokens, num_experts)
    total = state.score_TE.gather(1, state.expert_T.clamp(min=0).long().unsqueeze(1)).sum(dtype=torch.int64)
    reduced = (state.score_TE - state.price_E).amax(1).sum(dtype=torch.int64)
    top = state.price_E.sort(descending=True).values[:room].sum(dtype=torch.int64)
    return reduced + floor * state.price_E.sum(dtype=torch.int64) + top - total


def run_auction(
    scores_TE: torch.Tensor,
    *,
    rounds: Rounds = round_in_torch,
    warm_prices_E: torch.Tensor | None = None,
    num_rounds_max: int = 4000,
) -> Auction:
    """Assign tokens to experts, each expert getting ``floor(T/E)`` or ``ceil(T/E)``, by an auction on their device.

    Args:
        scores_TE: Finite affinities ``(T, E)``, ``T > 0``, ``E > 1``.
        rounds: Who computes the rounds; all give the same result to the last bit.
        warm_prices_E: Prices of a similar problem; the auction then starts with a smaller epsilon.
        num_rounds_max: Rounds of all phases together after which it gives up.

    Returns:
        The assignment and how good it is. The host waits for the device once in eight rounds.
    """
    num_tokens, num_experts = scores_TE.shape
    low, high = scores_TE.amin().double(), scores_TE.amax().double()
    unit = (high / 2 - low / 2) / (LEVELS // 2)  # halves, since the range of finite scores may be infinite
    divisor = torch.where(unit > 0, unit, 1.0)
    state = AuctionState(
        score_TE=((scores_TE.double() / 2 - low / 2) / (divisor / 2)).round().int(),
        price_E=torch.zeros(num_experts, dtype=torch.int32, device=scores_TE.device),
        expert_T=torch.full((num_tokens,), -1, dtype=torch.int32, device=scores_TE.device),
        bid_T=torch.zeros(num_tokens, dtype=torch.int32, device=scores_TE.device),
        idle_E=torch.full((num_experts,), -1, dtype=torch.int32, device=scores_TE.device),
        num_idle=-num_tokens % num_experts,
        places=-(-num_tokens // num_experts),
    )
    if warm_prices_E is not None:
        warm_E = (warm_prices_E.to(scores_TE.device).double() - warm_prices_E.min()) / divisor
        state.price_E = warm_E.clamp(max=8 * LEVELS).round().int()
    num_rounds, is_finished = 0, True
    for epsilon in _epsilons(_FIRST_EPSILON if warm_prices_E is None else _WARM_EPSILON):
        count, is_finished = _phase(state, epsilon, rounds, num_rounds_max - num_rounds)
        num_rounds += count
        if not is_finished:
            break
    rounding = num_tokens * unit  # scores are off by half a level each, in the total and in the best
    return Auction(
        expert_T=state.expert_T.long(),
        price_E=state.price_E.double() * unit,
        gap=_gap(state) * unit + rounding,
        num_rounds=num_rounds,
        is_finished=is_finished,
    )
