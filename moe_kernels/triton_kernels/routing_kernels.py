"""Device code of routing: scores, top-k and histogram in one pass, a counting sort, and expert choice by radix select.

No atomics: blocks count for themselves and an exclusive sum over the blocks tells each where its copies go, so copies
keep their order and results do not depend on timing. NaN counts as the lowest score, ties go to the lower index.

Shapes: T tokens, E experts, K experts per token, B blocks of tokens, C tokens per expert.
"""

# ruff: noqa: TID253, PLR0913, SIM108  `runtime.kernels` alone loads this file; kernels take what they take
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportOperatorIssue=false
import triton
import triton.language as tl

_LEAST = tl.constexpr(-(2**31))


@triton.jit
def _ordered(score):
    """Integers in the order of float32 scores."""
    score = tl.where(score != score, float("-inf"), score)
    bits = tl.where(score == 0.0, 0.0, score).to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def route_tokens(
    logit_ptr,
    expert_ptr,
    weight_ptr,
    prob_ptr,
    count_ptr,
    num_tokens,
    num_experts,
    K: tl.constexpr,
    IS_SIGMOID: tl.constexpr,
    IS_RENORMALISED: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Best K experts of each token, their weights, normalised scores, and copies per expert of the block."""
    token = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    expert = tl.arange(0, BLOCK_E)
    is_token = token < num_tokens
    is_expert = expert < num_experts
    place = token[:, None] * num_experts + expert[None, :]
    inside = is_token[:, None] & is_expert[None, :]
    logit = tl.load(logit_ptr + place, mask=inside, other=float("-inf")).to(tl.float32)
    key = tl.where(is_expert[None, :], _ordered(logit), _LEAST)
    if IS_SIGMOID:
        score = tl.where(is_expert[None, :], 1.0 / (1.0 + tl.exp(-logit)), 0.0)
    else:
        highest = tl.where(is_token, tl.max(logit, 1), 0.0)
        score = tl.where(is_expert[None, :], tl.exp(logit - highest[:, None]), 0.0)
    total = tl.maximum(tl.sum(score, 1), 1.1754943508222875e-38)
    slot = tl.arange(0, BLOCK_K)
    experts = tl.zeros([BLOCK_T, BLOCK_K], dtype=tl.int32)
    weights = tl.zeros([BLOCK_T, BLOCK_K], dtype=tl.float32)
    is_member = tl.zeros([BLOCK_T, BLOCK_E], dtype=tl.int32)
    for k in tl.static_range(K):
        best = tl.argmax(key, 1, tie_break_left=True)
        is_best = expert[None, :] == best[:, None]
        experts = tl.where(slot[None, :] == k, best[:, None], experts)
        weights = tl.where(slot[None, :] == k, tl.sum(tl.where(is_best, score, 0.0), 1)[:, None], weights)
        key = tl.where(is_best, _LEAST, key)
        is_member += is_best.to(tl.int32)
    at = token[:, None] * K + slot[None, :]
    is_slot = is_token[:, None] & (slot < K)[None, :]
    tl.store(expert_ptr + at, experts.to(tl.int64), mask=is_slot)
    count = tl.sum(tl.where(inside, is_member, 0), 0)
    tl.store(count_ptr + tl.program_id(0).to(tl.int64) * num_experts + expert, count, mask=is_expert)
    if HAS_WEIGHTS:
        share = total
        if IS_RENORMALISED:
            share = tl.maximum(tl.sum(weights, 1), 1.1754943508222875e-38)
        elif IS_SIGMOID:
            share = tl.full([BLOCK_T], 1.0, dtype=tl.float32)
        tl.store(weight_ptr + at, weights / share[:, None], mask=is_slot)
        tl.store(prob_ptr + place, score / total[:, None], mask=inside)


@triton.jit
def route_backward(
    logit_ptr,
    expert_ptr,
    weight_ptr,
    prob_ptr,
    grad_weight_ptr,
    grad_prob_ptr,
    grad_logit_ptr,
    num_tokens,
    num_experts,
    K: tl.constexpr,
    IS_SIGMOID: tl.constexpr,
    IS_RENORMALISED: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Gradient of the logits from those of the weights and of the normalised scores."""
    token = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    expert = tl.arange(0, BLOCK_E)
    slot = tl.arange(0, BLOCK_K)
    is_token = token < num_tokens
    place = token[:, None] * num_experts + expert[None, :]
    inside = is_token[:, None] & (expert < num_experts)[None, :]
    at = token[:, None] * K + slot[None, :]
    is_slot = is_token[:, None] & (slot < K)[None, :]
    prob = tl.load(prob_ptr + place, mask=inside, other=0.0)
    grad_prob = tl.load(grad_prob_ptr + place, mask=inside, other=0.0)
    weight = tl.load(weight_ptr + at, mask=is_slot, other=0.0)
    grad_weight = tl.load(grad_weight_ptr + at, mask=is_slot, other=0.0)
    mean = tl.zeros([BLOCK_T], dtype=tl.float32)
    if IS_RENORMALISED:
        mean = tl.sum(weight * grad_weight, 1)
    spread = tl.zeros([BLOCK_T, BLOCK_E], dtype=tl.float32)  # gradient of the weight of each chosen expert
    chosen = tl.zeros([BLOCK_T, BLOCK_E], dtype=tl.float32)  # and that weight
    for k in tl.static_range(K):
        best = tl.load(expert_ptr + token * K + k, mask=is_token, other=-1)
        is_best = expert[None, :] == best[:, None]
        is_k = slot[None, :] == k
        spread = tl.where(is_best, tl.sum(tl.where(is_k, grad_weight, 0.0), 1)[:, None] - mean[:, None], spread)
        chosen = tl.where(is_best, tl.sum(tl.where(is_k, weight, 0.0), 1)[:, None], chosen)
    grad_prob_mean = tl.sum(prob * grad_prob, 1)
    if IS_SIGMOID:
        logit = tl.load(logit_ptr + place, mask=inside, other=float("-inf")).to(tl.float32)
        score = 1.0 / (1.0 + tl.exp(-logit))
        # d weight / d logit = weight * (1 - score), renormalised or not; the same holds for the normalised scores
        grad = (1.0 - score) * (chosen * spread + prob * (grad_prob - grad_prob_mean[:, None]))
    elif IS_RENORMALISED:
        grad = chosen * spread + prob * (grad_prob - grad_prob_mean[:, None])
    else:
        whole = grad_prob + spread
        grad = prob * (whole - tl.sum(prob * whole, 1)[:, None])
    tl.store(grad_logit_ptr + place, grad.to(grad_logit_ptr.dtype.element_ty), mask=inside)


@triton.jit
def count_copies(
    expert_ptr, count_ptr, num_copies, num_experts, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr
):  # fmt: skip
    """Copies per expert of each block of copies."""
    copy = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    expert = tl.arange(0, BLOCK_E)
    own = tl.load(expert_ptr + copy, mask=copy < num_copies, other=-1)
    count = tl.sum((own[:, None] == expert[None, :]).to(tl.int32), 0)
    tl.store(count_ptr + tl.program_id(0).to(tl.int64) * num_experts + expert, count, mask=expert < num_experts)


@triton.jit
def place_copies(
    expert_ptr,
    offset_ptr,
    row_ptr,
    copy_ptr,
    num_tokens,
    num_experts,
    K: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Row of each copy, and copy of each row, from where the block's first copy of each expert goes."""
    token = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    expert = tl.arange(0, BLOCK_E)
    is_token = token < num_tokens
    is_member = tl.zeros([BLOCK_T, BLOCK_E], dtype=tl.int32)
    for k in tl.static_range(K):
        own = tl.load(expert_ptr + token * K + k, mask=is_token, other=-1)
        is_member += (own[:, None] == expert[None, :]).to(tl.int32)
    offset = tl.load(
        offset_ptr + tl.program_id(0).to(tl.int64) * num_experts + expert, mask=expert < num_experts, other=0
    )
    rows = offset[None, :] + (tl.cumsum(is_member, 0) - is_member).to(tl.int64)
    for k in tl.static_range(K):
        own = tl.load(expert_ptr + token * K + k, mask=is_token, other=-1)
        row = tl.sum(tl.where(own[:, None] == expert[None, :], rows, 0), 1)
        tl.store(row_ptr + token * K + k, row, mask=is_token)
        tl.store(copy_ptr + row, token * K + k, mask=is_token)


@triton.jit
def transpose_keys(
    score_ptr,
    group_ptr,
    group_of_expert_ptr,
    key_ptr,
    num_tokens,
    num_experts,
    HAS_GROUPS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """``key[e, t]``: the order of the scores as integers; the least of all for tokens of another group."""
    token = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    expert = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    is_token = token < num_tokens
    is_expert = expert < num_experts
    inside = is_token[:, None] & is_expert[None, :]
    score = tl.load(score_ptr + token[:, None] * num_experts + expert[None, :], mask=inside, other=0.0)
    key = _ordered(score.to(tl.float32))
    if HAS_GROUPS:
        group = tl.load(group_ptr + token, mask=is_token, other=-1)
        own = tl.load(group_of_expert_ptr + expert, mask=is_expert, other=-2)
        key = tl.where(group[:, None] == own[None, :], key, _LEAST)
    place = expert[:, None].to(tl.int64) * num_tokens + token[None, :]
    tl.store(key_ptr + place, tl.trans(key), mask=is_expert[:, None] & is_token[None, :])


@triton.jit
def radix_threshold(key_ptr, num_keys, need, BLOCK: tl.constexpr):
    """The ``need``-th highest of the int32 keys, and how many keys equal to it are among the ``need`` highest."""
    bins = tl.arange(0, 512)  # the upper half takes the keys that are not looked at
    threshold = need * 0
    for step in tl.static_range(4):
        shift = 24 - 8 * step
        counts = tl.zeros([512], dtype=tl.int32)
        for start in range(0, num_keys, BLOCK):
            place = start + tl.arange(0, BLOCK)
            key = tl.load(key_ptr + place, mask=place < num_keys, other=0)
            if step == 0:
                matches = place < num_keys
                digit = (key >> 24) + 128
            else:
                matches = (place < num_keys) & ((key >> (shift + 8)) == threshold)
                digit = (key >> shift) & 255
            counts += tl.histogram(tl.where(matches, digit, 256), 512)
        counts = tl.where(bins < 256, counts, 0)
        at_least = tl.sum(counts, 0) - tl.cumsum(counts, 0) + counts
        found = tl.max(tl.where((bins < 256) & (at_least >= need), bins, 0), 0)
        need -= tl.sum(tl.where(bins > found, counts, 0), 0)
        if step == 0:
            threshold = found - 128
        else:
            threshold = threshold * 256 + found
    return threshold, need


@triton.jit
def choose_tokens(
    key_ptr,
    capacity_ptr,
    list_ptr,
    mask_ptr,
    num_tokens,
    num_experts,
    list_width,
    HAS_LIST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Per expert: its ``capacity`` highest keys, as ascending token ids ``(E, C)`` or as membership ``(T, E)``."""
    expert = tl.program_id(0).to(tl.int64)
    keys = key_ptr + expert * num_tokens
    threshold, num_ties = radix_threshold(keys, num_tokens, tl.load(capacity_ptr + expert), BLOCK)
    taken = num_ties * 0
    ties = num_ties * 0
    for start in range(0, num_tokens, BLOCK):
        token = start + tl.arange(0, BLOCK)
        inside = token < num_tokens
        key = tl.load(keys + token, mask=inside, other=0)
        is_tie = (inside & (key == threshold)).to(tl.int32)
        is_early = ties + tl.cumsum(is_tie, 0) - is_tie < num_ties
        is_kept = (inside & ((key > threshold) | ((is_tie == 1) & is_early))).to(tl.int32)
        if HAS_LIST:
            place = taken + tl.cumsum(is_kept, 0) - is_kept
            tl.store(list_ptr + expert * list_width + place, token.to(tl.int64), mask=is_kept == 1)
        else:
            tl.store(mask_ptr + token.to(tl.int64) * num_experts + expert, is_kept.to(tl.int8), mask=inside)
        taken += tl.sum(is_kept, 0)
        ties += tl.sum(is_tie, 0)
