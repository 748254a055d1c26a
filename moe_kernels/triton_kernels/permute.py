"""Dispatch and combine by Triton, with autograd; the references are `moe_kernels.dispatch.dispatch` and `combine`.

Sums over the copies of a token run in the order of the routing, in float32 (float64 for float64), and are rounded once.
Written for copy bandwidth; block sizes have not been tuned on a device.

Shapes: T tokens, N routed copies, D model width.
"""

import torch
from torch.autograd.function import FunctionCtx, once_differentiable

from moe_kernels.triton_kernels.runtime import kernels, launch, next_power_of_2
from moe_kernels.types import TokenOrder

_BLOCK_MAX = 1024


def _meta(values: torch.Tensor) -> dict[str, object]:
    return {"BLOCK_D": min(_BLOCK_MAX, next_power_of_2(values.shape[1])), "num_warps": 4}


def gather_rows(source_TD: torch.Tensor, index_N: torch.Tensor) -> torch.Tensor:
    """Rows ``source[index]`` ``(N, D)``, without autograd.

    Args:
        source_TD: Rows to take from ``(T, D)``.
        index_N: Which ``(N,)``, int64; not checked.

    Returns:
        The rows.
    """
    source_TD = source_TD.contiguous()
    out_ND = source_TD.new_empty(index_N.numel(), source_TD.shape[1])
    launch(
        kernels("permute").gather_rows, (index_N.numel(),), source_TD, index_N, out_ND, source_TD.shape[1],
        **_meta(source_TD),
    )  # fmt: skip
    return out_ND


def sum_copies(
    source_ND: torch.Tensor, row_N: torch.Tensor, order: TokenOrder, weight_N: torch.Tensor | None = None
) -> torch.Tensor:
    """Weighted sum of each token's rows ``(T, D)`` in the order of its copies, without autograd.

    Args:
        source_ND: Rows ``(N, D)``.
        row_N: Row of each copy ``(N,)``.
        order: The copies of each token.
        weight_N: Weight of each copy ``(N,)``; ``None`` for ones.

    Returns:
        The sums in the dtype of the rows; zero where a token has no copy.
    """
    source_ND = source_ND.contiguous()
    num_tokens = order.start_T1.numel() - 1
    out_TD = source_ND.new_empty(num_tokens, source_ND.shape[1])
    launch(
        kernels("permute").sum_copies, (num_tokens,), source_ND, row_N, weight_N, order.copy_N, order.start_T1, out_TD,
        source_ND.shape[1], HAS_WEIGHT=weight_N is not None, IS_DOUBLE=source_ND.dtype == torch.float64,
        **_meta(source_ND),
    )  # fmt: skip
    return out_TD


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx, x_TD: torch.Tensor, source_N: torch.Tensor, row_N: torch.Tensor, order: TokenOrder
    ) -> torch.Tensor:
        ctx.save_for_backward(row_N, order.copy_N, order.start_T1)
        return gather_rows(x_TD, source_N)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: FunctionCtx, *gradients: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        row_N, copy_N, start_T1 = ctx.saved_tensors  # pyright: ignore[reportAttributeAccessIssue]
        return sum_copies(gradients[0], row_N, TokenOrder(copy_N=copy_N, start_T1=start_T1)), None, None, None


class _Unpermute(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx,
        out_ND: torch.Tensor,
        weight_N: torch.Tensor,
        token_N: torch.Tensor,
        row_N: torch.Tensor,
        order: TokenOrder,
    ) -> torch.Tensor:
        out_ND = out_ND.contiguous()
        ctx.save_for_backward(out_ND, weight_N, token_N, row_N)
        return sum_copies(out_ND, row_N, order, weight_N)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: FunctionCtx, *gradients: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        out_ND, weight_N, token_N, row_N = ctx.saved_tensors  # pyright: ignore[reportAttributeAccessIssue]
        grad_out_ND, grad_weight_N = torch.empty_like(out_ND), torch.empty_like(weight_N)
        launch(
            kernels("permute").combine_backward, (weight_N.numel(),), out_ND, gradients[0].contiguous(), token_N, row_N,
            weight_N, grad_out_ND, grad_weight_N, out_ND.shape[1], IS_DOUBLE=out_ND.dtype == torch.float64,
            **_meta(out_ND),
        )  # fmt: skip
        return grad_out_ND, grad_weight_N, None, None, None


def permute(x_TD: torch.Tensor, source_N: torch.Tensor, row_N: torch.Tensor, order: TokenOrder) -> torch.Tensor:
    """Copy token states into the order of their experts.

    Args:
        x_TD: Token states ``(T, D)``; differentiable.
        source_N: Token of each row ``(N,)``, int64.
        row_N: Row of each copy ``(N,)``, int64.
        order: The copies of each token.

    Returns:
        Rows ``(N, D)``.
    """
    return _Permute.apply(x_TD, source_N, row_N, order)


def unpermute(
    out_ND: torch.Tensor, weight_N: torch.Tensor, token_N: torch.Tensor, row_N: torch.Tensor, order: TokenOrder
) -> torch.Tensor:
    """Bring rows back to their tokens as weighted sums.

    Args:
        out_ND: Rows ``(N, D)``; differentiable.
        weight_N: Weight of each copy ``(N,)``; differentiable.
        token_N: Token of each copy ``(N,)``, int64.
        row_N: Row of each copy ``(N,)``, int64, each row once.
        order: The copies of each token.

    Returns:
        ``(T, D)`` in the dtype of the rows.
    """
    return _Unpermute.apply(out_ND, weight_N.contiguous(), token_N, row_N, order)
