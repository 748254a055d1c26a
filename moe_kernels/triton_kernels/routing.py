"""Routing by Triton; the references are `moe_kernels.selection` and the scores of `moe_kernels.routers`.

No copy to the host: token choice is a pass over the logits, sums over blocks, and a pass over the ids; expert choice is
two launches. Block sizes have not been tuned on a device.

Shapes: T tokens, E experts, K experts per token, N routed copies, C tokens per expert, B blocks.
"""

import torch
from torch.autograd.function import FunctionCtx, once_differentiable

from moe_kernels.errors import MoeError
from moe_kernels.triton_kernels.runtime import kernels, launch, next_power_of_2
from moe_kernels.types import ExpertOrder

_TILE = 2048
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def takes(scores_TE: torch.Tensor) -> bool:
    """Whether the kernels keep the full precision of such scores."""
    return scores_TE.dtype in _DTYPES


def _checked(scores_TE: torch.Tensor) -> torch.Tensor:
    if not takes(scores_TE):
        allowed = "float16, bfloat16, float32"
        remedy = 'convert the scores or use backend="torch"'
        raise MoeError("dtype of scores in Triton", got=scores_TE.dtype, allowed=allowed, remedy=remedy)
    return scores_TE.contiguous()


def _blocks(num_tokens: int, num_experts: int) -> tuple[int, int, dict[str, int]]:
    block_e = next_power_of_2(num_experts)
    block_t = max(1, min(64, _TILE // block_e))
    return -(-num_tokens // block_t), block_t, {"BLOCK_T": block_t, "BLOCK_E": block_e, "num_warps": 4}


def _place(expert_N: torch.Tensor, counts_BE: torch.Tensor, width: int, blocks: dict[str, int]) -> ExpertOrder:
    ends_BE = counts_BE.cumsum(0, dtype=torch.int64)
    counts_E = ends_BE[-1]
    offset_BE = ends_BE - counts_BE + (counts_E.cumsum(0) - counts_E)
    row_N, copy_N = torch.empty_like(expert_N), torch.zeros_like(expert_N)
    launch(
        kernels("routing").place_copies, (counts_BE.shape[0],), expert_N, offset_BE, row_N, copy_N,
        expert_N.numel() // width, counts_BE.shape[1], K=width, **blocks,
    )  # fmt: skip
    return ExpertOrder(copy_N=copy_N, row_N=row_N, counts_E=counts_E)


def sort_copies(expert_N: torch.Tensor, num_experts: int) -> ExpertOrder:
    """Sort routed copies by expert, keeping their order within each, by counting.

    Args:
        expert_N: Expert of each copy ``(N,)``, int64, in ``[0, E)``; not checked, since that would need the host.
        num_experts: E.

    Returns:
        The order.
    """
    expert_N = expert_N.contiguous()
    if not expert_N.numel():
        empty, zeros_E = torch.empty_like(expert_N), expert_N.new_zeros(num_experts)
        return ExpertOrder(copy_N=empty, row_N=empty, counts_E=zeros_E)
    num_blocks, _, blocks = _blocks(expert_N.numel(), num_experts)
    counts_BE = torch.empty(num_blocks, num_experts, dtype=torch.int32, device=expert_N.device)
    count = kernels("routing").count_copies
    launch(count, (num_blocks,), expert_N, counts_BE, expert_N.numel(), num_experts, **blocks)
    return _place(expert_N, counts_BE, 1, blocks)


class _Route(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx, logits_TE: torch.Tensor, count: int, is_sigmoid: bool, is_renormalised: bool
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        num_tokens, num_experts = logits_TE.shape
        num_blocks, _, blocks = _blocks(num_tokens, num_experts)
        meta = {"K": count, "IS_SIGMOID": is_sigmoid, "IS_RENORMALISED": is_renormalised, **blocks}
        meta["BLOCK_K"] = next_power_of_2(count)
        expert_TK = torch.empty(num_tokens, count, dtype=torch.int64, device=logits_TE.device)
        weight_TK = torch.empty(num_tokens, count, dtype=torch.float32, device=logits_TE.device)
        probs_TE = torch.empty(num_tokens, num_experts, dtype=torch.float32, device=logits_TE.device)
        counts_BE = torch.empty(num_blocks, num_experts, dtype=torch.int32, device=logits_TE.device)
        launch(
            kernels("routing").route_tokens, (num_blocks,), logits_TE, expert_TK, weight_TK, probs_TE, counts_BE,
            num_tokens, num_experts, HAS_WEIGHTS=True, **meta,
        )  # fmt: skip
        ctx.save_for_backward(logits_TE, expert_TK, weight_TK, probs_TE)
        ctx.meta = meta  # pyright: ignore[reportAttributeAccessIssue]
        ctx.mark_non_differentiable(expert_TK, counts_BE)
        return expert_TK, weight_TK, probs_TE, counts_BE

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: FunctionCtx, *gradients: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        logits_TE, expert_TK, weight_TK, probs_TE = ctx.saved_tensors  # pyright: ignore[reportAttributeAccessIssue]
        meta: dict[str, int] = ctx.meta  # pyright: ignore[reportAttributeAccessIssue]
        grad_TE = torch.empty_like(logits_TE)
        launch(
            kernels("routing").route_backward, (-(-logits_TE.shape[0] // meta["BLOCK_T"]),), logits_TE, expert_TK,
            weight_TK, probs_TE, *(gradient.contiguous() for gradient in gradients[1:3]), grad_TE, *logits_TE.shape,
            **meta,
        )  # fmt: skip
        return grad_TE, None, None, None


def route_top_k(
    logits_TE: torch.Tensor, experts_per_token: int, *, score: str = "softmax", is_renormalised: bool = True
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, ExpertOrder]:
    """Token choice in one pass over the logits: scores, best experts, their weights, and the order by expert.

    Args:
        logits_TE: Router logits ``(T, E)``, float16, bfloat16 or float32; differentiable.
        experts_per_token: K, 1 to E.
        score: ``softmax`` over the experts, or ``sigmoid`` of each.
        is_renormalised: Whether the K weights of a token are scaled to sum to 1.

    Returns:
        Expert ids ``(T, K)``, best first; weights ``(T, K)`` and scores that sum to 1 ``(T, E)``, both float32 and
        differentiable; the order of the copies by expert.

    Raises:
        MoeError: If the dtype does not fit.
    """
    logits_TE = _checked(logits_TE)
    num_tokens, num_experts = logits_TE.shape
    expert_TK, weight_TK, probs_TE, counts_BE = _Route.apply(
        logits_TE, experts_per_token, score == "sigmoid", is_renormalised
    )
    if not num_tokens:
        return expert_TK, weight_TK, probs_TE, sort_copies(expert_TK.reshape(-1), num_experts)
    order = _place(expert_TK.view(-1), counts_BE, experts_per_token, _blocks(num_tokens, num_experts)[2])
    return expert_TK, weight_TK, probs_TE, order


def top_experts(scores_TE: torch.Tensor, experts_per_token: int) -> torch.Tensor:
    """`moe_kernels.selection.top_experts`: expert ids ``(T, K)``, best first, without autograd.

    Args:
        scores_TE: Scores ``(T, E)``, float16, bfloat16 or float32.
        experts_per_token: K, 1 to E.

    Returns:
        The ids, int64.

    Raises:
        MoeError: If the dtype does not fit.
    """
    scores_TE = _checked(scores_TE.detach())
    num_tokens, num_experts = scores_TE.shape
    num_blocks, _, blocks = _blocks(num_tokens, num_experts)
    expert_TK = torch.empty(num_tokens, experts_per_token, dtype=torch.int64, device=scores_TE.device)
    counts_BE = torch.empty(num_blocks, num_experts, dtype=torch.int32, device=scores_TE.device)
    launch(
        kernels("routing").route_tokens, (num_blocks,), scores_TE, expert_TK, None, None, counts_BE, num_tokens,
        num_experts, K=experts_per_token, IS_SIGMOID=False, IS_RENORMALISED=False, HAS_WEIGHTS=False,
        BLOCK_K=next_power_of_2(experts_per_token), **blocks,
    )  # fmt: skip
    return expert_TK


def _keys(scores_TE: torch.Tensor, group_T: torch.Tensor | None, group_E: torch.Tensor | None) -> torch.Tensor:
    num_tokens, num_experts = scores_TE.shape
    keys_ET = torch.empty(num_experts, num_tokens, dtype=torch.int32, device=scores_TE.device)
    block_e = min(64, next_power_of_2(num_experts))
    grid = (-(-num_tokens // 64), -(-num_experts // block_e))
    launch(
        kernels("routing").transpose_keys, grid, scores_TE, group_T, group_E, keys_ET, num_tokens, num_experts,
        HAS_GROUPS=group_T is not None, BLOCK_T=64, BLOCK_E=block_e, num_warps=4,
    )  # fmt: skip
    return keys_ET


def _block(num_tokens: int) -> dict[str, int]:
    return {"BLOCK": max(16, min(2048, next_power_of_2(num_tokens))), "num_warps": 8}


def top_tokens(scores_TE: torch.Tensor, capacity: int) -> torch.Tensor:
    """`moe_kernels.selection.top_tokens`: the best tokens of each expert ``(E, C)``, ascending, without autograd.

    Args:
        scores_TE: Scores ``(T, E)``, float16, bfloat16 or float32.
        capacity: C, 0 to T.

    Returns:
        The ids, int64.

    Raises:
        MoeError: If the dtype does not fit.
    """
    scores_TE = _checked(scores_TE.detach())
    num_tokens, num_experts = scores_TE.shape
    token_EC = torch.empty(num_experts, capacity, dtype=torch.int64, device=scores_TE.device)
    capacity_E = torch.full((num_experts,), capacity, dtype=torch.int32, device=scores_TE.device)
    launch(
        kernels("routing").choose_tokens, (num_experts if capacity else 0,), _keys(scores_TE, None, None), capacity_E,
        token_EC, None, num_tokens, num_experts, capacity, HAS_LIST=True, **_block(num_tokens),
    )  # fmt: skip
    return token_EC


def choose_in_groups(
    scores_TE: torch.Tensor, group_T: torch.Tensor, group_E: torch.Tensor, capacity_E: torch.Tensor
) -> torch.Tensor:
    """Expert choice inside groups: the best tokens of each expert among those of its group.

    Args:
        scores_TE: Scores ``(T, E)``, float16, bfloat16 or float32.
        group_T: Group of each token ``(T,)``, negative for none, such as padding.
        group_E: Group of each expert ``(E,)``.
        capacity_E: Tokens that each expert takes ``(E,)``, at most those of its group, which is not checked.

    Returns:
        Membership ``(T, E)``, boolean.

    Raises:
        MoeError: If the dtype does not fit.
    """
    scores_TE = _checked(scores_TE.detach())
    num_tokens, num_experts = scores_TE.shape
    is_chosen_TE = torch.empty(num_tokens, num_experts, dtype=torch.int8, device=scores_TE.device)
    if num_tokens:
        keys_ET = _keys(scores_TE, group_T.contiguous(), group_E.contiguous())
        launch(
            kernels("routing").choose_tokens, (num_experts,), keys_ET, capacity_E.int(), None, is_chosen_TE, num_tokens,
            num_experts, 0, HAS_LIST=False, **_block(num_tokens),
        )  # fmt: skip
    return is_chosen_TE.bool()
