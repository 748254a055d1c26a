"""Dispatch and combine: token states to the order of their experts and back, with gradients. Capacity too.

Shapes: T tokens, E experts, N routed copies, D model width, C capacity.
"""

import dataclasses
import math
from collections.abc import Callable

import torch
from torch.nn import functional

from moe_kernels.errors import check_choice, check_range
from moe_kernels.experts import SwigluExperts, check_rows
from moe_kernels.native_experts import swiglu_tokens_native
from moe_kernels.selection import sort_copies
from moe_kernels.triton_kernels.grouped import swiglu_tokens
from moe_kernels.triton_kernels.permute import permute, unpermute
from moe_kernels.triton_kernels.runtime import use_triton
from moe_kernels.types import Dispatch, Routing, TokenOrder

PRIORITIES = ("position", "weight")


def order_by_token(token_N: torch.Tensor, num_tokens: int) -> TokenOrder:
    """Find the copies of each token, on CUDA devices without the host.

    Args:
        token_N: Token of each copy ``(N,)``, int64.
        num_tokens: T.

    Returns:
        The copies by token, those of one token in the order of the routing.
    """
    if token_N.device.type == "cpu":
        order = sort_copies(token_N, num_tokens)
        return TokenOrder(copy_N=order.copy_N, start_T1=functional.pad(order.counts_E.cumsum(0), (1, 0)))
    sorted_N, copy_N = torch.sort(token_N, stable=True)
    return TokenOrder(
        copy_N=copy_N, start_T1=torch.searchsorted(sorted_N, torch.arange(num_tokens + 1, device=token_N.device))
    )


def dispatch(x_TD: torch.Tensor, routing: Routing, *, backend: str = "auto") -> Dispatch:
    """Copy token states into the order of their experts.

    Args:
        x_TD: Token states ``(T, D)``.
        routing: Where they go.
        backend: ``torch``, ``triton``, or ``auto``: Triton on CUDA devices.

    Returns:
        The rows sorted by expert, within one in the order of the routing; differentiable in the states and weights.

    Raises:
        MoeError: If the backend cannot be had.
    """
    order = routing.by_expert or sort_copies(routing.expert_N, routing.num_experts, backend=backend)
    source_N = routing.token_N[order.copy_N]
    by_token = order_by_token(routing.token_N, routing.num_tokens) if use_triton(backend, x_TD) else None
    return Dispatch(
        rows_ND=x_TD.index_select(0, source_N) if by_token is None else permute(x_TD, source_N, order.row_N, by_token),
        counts_E=order.counts_E,
        token_N=routing.token_N,
        weight_N=routing.weight_N,
        row_N=order.row_N,
        num_tokens=routing.num_tokens,
        by_token=by_token,
    )


def combine(out_ND: torch.Tensor, dispatched: Dispatch, *, backend: str = "auto") -> torch.Tensor:
    """Bring expert outputs back to their tokens: the weighted sum of each token's rows, zero where it has none.

    Args:
        out_ND: Expert outputs ``(N, D)`` in the order of ``dispatched.rows_ND``.
        dispatched: What `dispatch` returned.
        backend: ``torch``, ``triton``, or ``auto``: Triton on CUDA devices, where sums keep their order, too.

    Returns:
        ``(T, D)`` in the dtype of ``out_ND``; differentiable in the outputs and the weights.

    Raises:
        MoeError: If the backend cannot be had.
    """
    if use_triton(backend, out_ND):
        order = dispatched.by_token or order_by_token(dispatched.token_N, dispatched.num_tokens)
        return unpermute(out_ND, dispatched.weight_N, dispatched.token_N, dispatched.row_N, order)
    weighted_ND = out_ND.index_select(0, dispatched.row_N) * dispatched.weight_N.to(out_ND.dtype).unsqueeze(1)
    zeros_TD = out_ND.new_zeros(dispatched.num_tokens, out_ND.shape[1])
    return zeros_TD.index_add(0, dispatched.token_N, weighted_ND)


def run_experts(x_TD: torch.Tensor, routing: Routing, experts: Callable[..., torch.Tensor]) -> torch.Tensor:
    """Dispatch, experts, combine. `SwigluExperts` in Triton or native code read the token states in place.

    Args:
        x_TD: Token states ``(T, D)``.
        routing: Where they go.
        experts: Maps rows ``(N, D)`` sorted by expert, with their counts ``(E,)``, to rows in the same order.

    Returns:
        ``(T, D)``, zero for tokens without an expert.
    """
    if isinstance(experts, SwigluExperts) and not experts.reads_in_place(x_TD) and experts.is_native(x_TD):
        order = routing.by_expert or sort_copies(routing.expert_N, routing.num_experts)
        check_rows(routing.token_N, order.counts_E, experts.num_experts)
        by_token = order_by_token(routing.token_N, routing.num_tokens)
        return swiglu_tokens_native(x_TD, routing, order, by_token, experts.weights(x_TD.dtype))
    if not (isinstance(experts, SwigluExperts) and experts.reads_in_place(x_TD)):
        dispatched = dispatch(x_TD, routing)
        return combine(experts(dispatched.rows_ND, dispatched.counts_E), dispatched)
    order = routing.by_expert or sort_copies(routing.expert_N, routing.num_experts, backend="triton")
    by_token = order_by_token(routing.token_N, routing.num_tokens)
    weights = experts.weights(x_TD.dtype)
    out_ND = swiglu_tokens(x_TD, routing.token_N[order.copy_N], order.row_N, by_token, order.counts_E, weights)
    return unpermute(out_ND, routing.weight_N, routing.token_N, order.row_N, by_token)


def capacity_of(num_copies: int, num_experts: int, capacity_factor: float) -> int:
    """Rows an expert may take: the mean load times the factor, rounded up, at least 1.

    Args:
        num_copies: Routed copies of the batch.
        num_experts: Experts of the layer.
        capacity_factor: 1.0 = the mean load.

    Returns:
        The capacity.
    """
    return max(1, math.ceil(capacity_factor * num_copies / num_experts))


def limit_capacity(routing: Routing, capacity_factor: float | None, *, priority: str = "position") -> Routing:
    """Drop the routed copies above each expert's capacity.

    Args:
        routing: What a router returned.
        capacity_factor: See `capacity_of`; ``None`` drops nothing.
        priority: Who stays: ``position`` keeps the first tokens, which does not look at later ones; ``weight`` the
            highest combine weights, which does, so it is for training only.

    Returns:
        The routing without what was dropped; the weights left are not renormalised.

    Raises:
        MoeError: If the factor is not positive or the priority unknown.
    """
    check_choice("priority", priority, PRIORITIES)
    if capacity_factor is None:
        return routing
    check_range("capacity_factor", capacity_factor, low=1e-9, remedy="use None to drop nothing")
    num_copies = routing.token_N.numel()
    capacity = capacity_of(num_copies, routing.num_experts, capacity_factor)
    order_N = torch.argsort(routing.token_N, stable=True)
    if priority == "weight":
        order_N = order_N[torch.argsort(routing.weight_N.detach()[order_N], descending=True, stable=True)]
    order_N = order_N[torch.argsort(routing.expert_N[order_N], stable=True)]
    counts_E = routing.expert_counts()
    starts_E = counts_E.cumsum(0) - counts_E
    place_N = torch.arange(num_copies, device=order_N.device) - starts_E[routing.expert_N[order_N]]
    kept_N = order_N[place_N < capacity].sort().values
    return dataclasses.replace(
        routing,
        token_N=routing.token_N[kept_N],
        expert_N=routing.expert_N[kept_N],
        weight_N=routing.weight_N[kept_N],
        num_dropped=routing.num_dropped + num_copies - kept_N.numel(),
        by_expert=None,
    )
