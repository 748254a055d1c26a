"""Device code of the auction with epsilon scaling: one kernel for the bids, one for what the experts keep.

Whole numbers only, no atomics: the same answer on every device.

Shapes: T tokens, E experts.
"""

# ruff: noqa: TID253, PLR0913  `runtime.kernels` alone loads this file; kernels take what they take
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportOperatorIssue=false, reportCallIssue=false
import triton
import triton.language as tl

from moe_kernels.triton_kernels.routing_kernels import radix_threshold

_LEAST = tl.constexpr(-(2**31))


@triton.jit
def bid_tokens(
    score_ptr,
    price_ptr,
    expert_ptr,
    bid_ptr,
    num_tokens,
    num_experts,
    epsilon,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Tokens without an expert bid for their first choice; of equal ones, the first at or after id = token."""
    token = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    expert = tl.arange(0, BLOCK_E)
    is_free = tl.load(expert_ptr + token, mask=token < num_tokens, other=0) < 0
    if tl.sum(is_free.to(tl.int32), 0) == 0:
        return
    is_expert = (expert < num_experts)[None, :]
    price = tl.load(price_ptr + expert, mask=expert < num_experts, other=0)
    place = token[:, None].to(tl.int64) * num_experts + expert[None, :]
    score = tl.load(score_ptr + place, mask=is_free[:, None] & is_expert, other=0)
    value = tl.where(is_expert, score - price[None, :], _LEAST)
    top = tl.max(value, 1)
    turn = expert[None, :] - (token % num_experts)[:, None]
    turn = tl.where(turn < 0, turn + num_experts, turn)
    first = tl.argmin(tl.where((value == top[:, None]) & is_expert, turn, 2 * BLOCK_E), 1)
    is_first = expert[None, :] == first[:, None]
    second = tl.max(tl.where(is_first, _LEAST, value), 1)
    bid = tl.sum(tl.where(is_first, price[None, :], 0), 1) + top - second + epsilon
    tl.store(expert_ptr + token, first.to(tl.int32), mask=is_free)
    tl.store(bid_ptr + token, bid, mask=is_free)


@triton.jit
def settle_experts(
    price_ptr,
    expert_ptr,
    bid_ptr,
    idle_ptr,
    own_ptr,
    own_bid_ptr,
    num_tokens,
    places,
    BLOCK: tl.constexpr,
):
    """One program per expert: collect its bidders, keep the highest bids, turn the others away, set the price."""
    expert = tl.program_id(0)
    own = own_ptr + expert.to(tl.int64) * (num_tokens + 1)
    own_bid = own_bid_ptr + expert.to(tl.int64) * (num_tokens + 1)
    count = expert * 0
    lowest = expert * 0 + 2147483647
    for start in range(0, num_tokens, BLOCK):
        token = start + tl.arange(0, BLOCK)
        is_own = tl.load(expert_ptr + token, mask=token < num_tokens, other=-1) == expert
        place = count + tl.cumsum(is_own.to(tl.int32), 0) - 1
        bid = tl.load(bid_ptr + token, mask=is_own, other=2147483647)
        tl.store(own + place, token, mask=is_own)
        tl.store(own_bid + place, bid, mask=is_own)
        count += tl.sum(is_own.to(tl.int32), 0)
        lowest = tl.minimum(lowest, tl.min(bid, 0))
    idle = tl.load(idle_ptr + expert)
    if idle >= 0:  # the idle bidder comes last, so it loses ties
        tl.store(own + count, -1)
        tl.store(own_bid + count, idle)
        count += 1
        lowest = tl.minimum(lowest, idle)
    if count == places:
        tl.store(price_ptr + expert, lowest)
    if count > places:
        tl.debug_barrier()  # the lists were written by other threads of this program
        threshold, num_ties = radix_threshold(own_bid, count, places, BLOCK)
        tl.store(price_ptr + expert, threshold)
        ties = count * 0
        for start in range(0, count, BLOCK):
            place = start + tl.arange(0, BLOCK)
            inside = place < count
            bid = tl.load(own_bid + place, mask=inside, other=0)
            token = tl.load(own + place, mask=inside, other=-1)
            is_tie = (inside & (bid == threshold)).to(tl.int32)
            is_late = ties + tl.cumsum(is_tie, 0) - is_tie >= num_ties
            is_lost = inside & ((bid < threshold) | ((is_tie == 1) & is_late))
            tl.store(expert_ptr + token, -1, mask=is_lost & (token >= 0))
            if tl.sum((is_lost & (token < 0)).to(tl.int32), 0) > 0:
                tl.store(idle_ptr + expert, -1)
            ties += tl.sum(is_tie, 0)
