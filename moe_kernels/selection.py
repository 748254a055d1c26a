"""Selecting: experts of tokens, tokens of experts, and the order of copies by expert.

Each has a native version in ``native/routing.cpp`` for float32, bfloat16 and float16 on the CPU, a Triton version for
CUDA devices, and a torch version for everything else. ``backend`` is ``auto``, or forces ``triton`` or ``torch`` (with
the native code).

Shapes: T tokens, E experts, K experts per token, C tokens per expert, N routed copies.
"""

import ctypes
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from moe_kernels.errors import check_range
from moe_kernels.native import load_library
from moe_kernels.triton_kernels import routing
from moe_kernels.triton_kernels.runtime import use_triton
from moe_kernels.types import ExpertOrder

_TOKENS_MAX = 2**31 - 1
_SIZES = [ctypes.c_int64] * 3
_SIGNATURES = {
    "moe_top_k": [ctypes.c_void_p, *_SIZES, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p],
    "moe_best_tokens": [ctypes.c_void_p, *_SIZES, ctypes.c_int, ctypes.c_void_p],
    "moe_sort_copies": [ctypes.c_void_p, *_SIZES[:2], ctypes.c_int, *[ctypes.c_void_p] * 3],
}
_ROUNDED = (torch.float32, torch.bfloat16, torch.float16)
"""Dtypes of scores that float32 holds without a change."""


def _library(tensor: torch.Tensor, dtypes: tuple[torch.dtype, ...]) -> ctypes.CDLL | None:
    is_fit = tensor.device.type == "cpu" and tensor.dtype in dtypes and 0 < tensor.shape[0] <= _TOKENS_MAX
    library = load_library("routing") if is_fit else None
    if library is not None and library.moe_top_k.argtypes is None:
        for name, signature in _SIGNATURES.items():
            getattr(library, name).argtypes = signature
    return library


def _on_triton(backend: str, scores_TE: torch.Tensor) -> bool:
    return use_triton(backend, scores_TE) and (backend == "triton" or routing.takes(scores_TE))


def top_experts(scores_TE: torch.Tensor, experts_per_token: int, *, backend: str = "auto") -> torch.Tensor:
    """The experts with the highest scores of each token.

    Args:
        scores_TE: Scores ``(T, E)``; NaN counts as the lowest but in torch.
        experts_per_token: K, 1 to E.
        backend: See above.

    Returns:
        Expert ids ``(T, K)``, int64, best first; equal scores in the order of ids but in torch.

    Raises:
        MoeError: If K is out of range, or the backend cannot be had.
    """
    num_experts = scores_TE.shape[1]
    check_range("experts_per_token", experts_per_token, low=1, high=num_experts)
    if _on_triton(backend, scores_TE):
        return routing.top_experts(scores_TE, experts_per_token)
    scores_TE = scores_TE.detach()
    library = _library(scores_TE, _ROUNDED)
    if library is None:
        return scores_TE.topk(experts_per_token, dim=1).indices
    return _best_experts(library, scores_TE, experts_per_token, None)


def _best_experts(
    library: ctypes.CDLL, scores_TE: torch.Tensor, experts_per_token: int, weight_TK: torch.Tensor | None
) -> torch.Tensor:
    num_tokens, num_experts = scores_TE.shape
    scores_TE = scores_TE.float().contiguous()
    expert_TK = torch.empty(num_tokens, experts_per_token, dtype=torch.int64)
    threads, weight = torch.get_num_threads(), None if weight_TK is None else weight_TK.data_ptr()
    sizes = (num_tokens, num_experts, experts_per_token)
    if library.moe_top_k(scores_TE.data_ptr(), *sizes, threads, expert_TK.data_ptr(), weight):
        raise MemoryError(f"no memory to route {num_tokens} tokens")
    return expert_TK


def weighted_experts(logits_TE: torch.Tensor, experts_per_token: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`top_experts` and the softmax over their logits, in one pass where native code can.

    Args:
        logits_TE: Router logits ``(T, E)``.
        experts_per_token: K, 1 to E.

    Returns:
        Expert ids and weights ``(T, K)``; the weights are differentiable in the logits.

    Raises:
        MoeError: If K is out of range.
    """
    check_range("experts_per_token", experts_per_token, low=1, high=logits_TE.shape[1])
    return _WeightedExperts.apply(logits_TE, experts_per_token)


class _WeightedExperts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits_TE: torch.Tensor, experts_per_token: int) -> tuple[torch.Tensor, torch.Tensor]:
        library = _library(logits_TE, (torch.float32,))
        if library is None:
            expert_TK = top_experts(logits_TE, experts_per_token)
            weight_TK = torch.softmax(logits_TE.gather(1, expert_TK), dim=-1)
        else:
            weight_TK = torch.empty(logits_TE.shape[0], experts_per_token)
            expert_TK = _best_experts(library, logits_TE, experts_per_token, weight_TK)
        ctx.mark_non_differentiable(expert_TK)
        ctx.save_for_backward(expert_TK, weight_TK)
        ctx.num_experts = logits_TE.shape[1]
        return expert_TK, weight_TK

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        expert_TK, weight_TK = ctx.saved_tensors
        chosen_TK = weight_TK * gradients[1]
        chosen_TK = chosen_TK - weight_TK * chosen_TK.sum(1, keepdim=True)
        return chosen_TK.new_zeros(len(expert_TK), ctx.num_experts).scatter_(1, expert_TK, chosen_TK), None


def top_tokens(scores_TE: torch.Tensor, capacity: int, *, backend: str = "auto") -> torch.Tensor:
    """The tokens with the highest scores of each expert.

    Args:
        scores_TE: Scores ``(T, E)``.
        capacity: C, 0 to T.
        backend: See above.

    Returns:
        Token ids ``(E, C)``, int64, ascending; of equal scores the first tokens but in torch.

    Raises:
        MoeError: If C is out of range, or the backend cannot be had.
    """
    num_tokens, num_experts = scores_TE.shape
    check_range("capacity", capacity, low=0, high=num_tokens)
    if _on_triton(backend, scores_TE):
        return routing.top_tokens(scores_TE, capacity)
    scores_TE = scores_TE.detach()
    library = _library(scores_TE, _ROUNDED)
    if library is None or capacity == 0:
        return scores_TE.t().topk(capacity, dim=1).indices.sort(dim=1).values
    scores_TE = scores_TE.float().contiguous()
    token_EC = torch.empty(num_experts, capacity, dtype=torch.int64)
    sizes = (num_tokens, num_experts, capacity)
    if library.moe_best_tokens(scores_TE.data_ptr(), *sizes, torch.get_num_threads(), token_EC.data_ptr()):
        raise MemoryError(f"no memory to route {num_tokens} tokens")
    return token_EC


def choose_in_groups(
    scores_TE: torch.Tensor,
    group_T: torch.Tensor,
    group_E: torch.Tensor,
    capacity_E: torch.Tensor,
    *,
    backend: str = "auto",
) -> torch.Tensor:
    """Expert choice inside groups: the tokens with the highest scores of each expert among those of its group.

    Args:
        scores_TE: Scores ``(T, E)``.
        group_T: Group of each token ``(T,)``; negative for none, such as padding.
        group_E: Group of each expert ``(E,)``.
        capacity_E: Tokens that each expert takes ``(E,)``, 0 to those of its group, which only the torch code checks.
        backend: See above.

    Returns:
        Membership ``(T, E)``, boolean.

    Raises:
        MoeError: If the backend cannot be had, or a capacity is out of range.
    """
    if _on_triton(backend, scores_TE):
        return routing.choose_in_groups(scores_TE, group_T, group_E, capacity_E)
    is_chosen_TE = torch.zeros_like(scores_TE, dtype=torch.bool)
    members = {group: (group_T == group).nonzero().squeeze(1) for group in set(group_E.tolist())}
    for expert, (group, capacity) in enumerate(zip(group_E.tolist(), capacity_E.tolist(), strict=True)):
        own_N = members[group]
        check_range("capacity_E", capacity, low=0, high=own_N.numel(), remedy="count the tokens of the group")
        best = scores_TE.detach()[own_N, expert].topk(capacity).indices
        is_chosen_TE[own_N[best], expert] = True
    return is_chosen_TE


def sort_copies(expert_N: torch.Tensor, num_experts: int, *, backend: str = "auto") -> ExpertOrder:
    """Sort routed copies by expert, keeping their order within each.

    Args:
        expert_N: Expert of each copy ``(N,)``, int64, in ``[0, E)``; Triton does not check.
        num_experts: E.
        backend: See above.

    Returns:
        The order.

    Raises:
        MoeError: If an id is out of range, or the backend cannot be had.
    """
    if use_triton(backend, expert_N):
        return routing.sort_copies(expert_N, num_experts)
    library = _library(expert_N, (torch.int64,))
    if library is None:
        order_N = torch.argsort(expert_N, stable=True)
        row_N = torch.empty_like(order_N).scatter_(0, order_N, torch.arange(order_N.numel(), device=order_N.device))
        counts_E = torch.bincount(expert_N, minlength=num_experts)
        return ExpertOrder(copy_N=order_N, row_N=row_N, counts_E=counts_E)
    expert_N = expert_N.contiguous()
    order_N, row_N = torch.empty_like(expert_N), torch.empty_like(expert_N)
    counts_E = torch.empty(num_experts, dtype=torch.int64)
    pointers = [tensor.data_ptr() for tensor in (order_N, row_N, counts_E)]
    num_copies, threads = expert_N.numel(), torch.get_num_threads()
    if library.moe_sort_copies(expert_N.data_ptr(), num_copies, num_experts, threads, *pointers):
        check_range("expert ids", int(expert_N.min()), low=0, high=num_experts - 1)
        check_range("expert ids", int(expert_N.max()), low=0, high=num_experts - 1)
        raise MemoryError(f"no memory to sort {num_copies} copies")
    return ExpertOrder(copy_N=order_N, row_N=row_N, counts_E=counts_E)
