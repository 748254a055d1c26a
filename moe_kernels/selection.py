"""Selecting without gradients: experts of tokens, tokens of experts, and the order of copies by expert.

Each has a native version in ``native/routing.cpp`` for float32 on the CPU and a torch version for everything else.

Shapes: T tokens, E experts, K experts per token, C tokens per expert, N routed copies.
"""

import ctypes

import torch

from moe_kernels.errors import check_range
from moe_kernels.native import load_library

_TOKENS_MAX = 2**31 - 1


def _pointer(tensor: torch.Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


def _library(tensor: torch.Tensor, dtype: torch.dtype) -> ctypes.CDLL | None:
    is_fit = tensor.device.type == "cpu" and tensor.dtype == dtype and 0 < tensor.shape[0] <= _TOKENS_MAX
    return load_library("routing") if is_fit else None


def top_experts(scores_TE: torch.Tensor, experts_per_token: int) -> torch.Tensor:
    """The experts with the highest scores of each token.

    Args:
        scores_TE: Scores ``(T, E)``; NaN counts as the lowest on the native path.
        experts_per_token: K, 1 to E.

    Returns:
        Expert ids ``(T, K)``, int64, best first; equal scores in the order of ids on the native path.

    Raises:
        MoeError: If K is out of range.
    """
    num_tokens, num_experts = scores_TE.shape
    check_range("experts_per_token", experts_per_token, low=1, high=num_experts)
    scores_TE = scores_TE.detach()
    library = _library(scores_TE, torch.float32)
    if library is None:
        return scores_TE.topk(experts_per_token, dim=1).indices
    scores_TE = scores_TE.contiguous()
    expert_TK = torch.empty(num_tokens, experts_per_token, dtype=torch.int64)
    sizes = (ctypes.c_int64(num_tokens), ctypes.c_int64(num_experts), ctypes.c_int64(experts_per_token))
    if library.moe_top_k(_pointer(scores_TE), *sizes, torch.get_num_threads(), _pointer(expert_TK)):
        raise MemoryError(f"no memory to route {num_tokens} tokens")
    return expert_TK


def top_tokens(scores_TE: torch.Tensor, capacity: int) -> torch.Tensor:
    """The tokens with the highest scores of each expert.

    Args:
        scores_TE: Scores ``(T, E)``.
        capacity: C, 0 to T.

    Returns:
        Token ids ``(E, C)``, int64, ascending; of equal scores the first tokens on the native path.

    Raises:
        MoeError: If C is out of range.
    """
    num_tokens, num_experts = scores_TE.shape
    check_range("capacity", capacity, low=0, high=num_tokens)
    scores_TE = scores_TE.detach()
    library = _library(scores_TE, torch.float32)
    if library is None or capacity == 0:
        return scores_TE.t().topk(capacity, dim=1).indices.sort(dim=1).values
    scores_TE = scores_TE.contiguous()
    token_EC = torch.empty(num_experts, capacity, dtype=torch.int64)
    sizes = (ctypes.c_int64(num_tokens), ctypes.c_int64(num_experts), ctypes.c_int64(capacity))
    if library.moe_best_tokens(_pointer(scores_TE), *sizes, torch.get_num_threads(), _pointer(token_EC)):
        raise MemoryError(f"no memory to route {num_tokens} tokens")
    return token_EC


def sort_copies(expert_N: torch.Tensor, num_experts: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sort routed copies by expert, keeping their order within each.

    Args:
        expert_N: Expert of each copy ``(N,)``, int64, in ``[0, E)``.
        num_experts: E.

    Returns:
        The copy in each row ``(N,)``; the row of each copy ``(N,)``; rows per expert ``(E,)``.

    Raises:
        MoeError: If an id is out of range.
    """
    library = _library(expert_N, torch.int64)
    if library is None:
        order_N = torch.argsort(expert_N, stable=True)
        row_N = torch.empty_like(order_N).scatter_(0, order_N, torch.arange(order_N.numel(), device=order_N.device))
        return order_N, row_N, torch.bincount(expert_N, minlength=num_experts)
    expert_N = expert_N.contiguous()
    order_N, row_N = torch.empty_like(expert_N), torch.empty_like(expert_N)
    counts_E = torch.empty(num_experts, dtype=torch.int64)
    sizes = (ctypes.c_int64(expert_N.numel()), ctypes.c_int64(num_experts))
    if library.moe_sort_copies(_pointer(expert_N), *sizes, *map(_pointer, (order_N, row_N, counts_E))):
        check_range("expert ids", int(expert_N.min()), low=0, high=num_experts - 1)
        check_range("expert ids", int(expert_N.max()), low=0, high=num_experts - 1)
        raise MemoryError(f"no memory to sort {expert_N.numel()} copies")
    return order_N, row_N, counts_E
