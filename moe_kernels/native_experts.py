"""SwiGLU experts in native code for bfloat16 on CPUs: ``native/swiglu.hpp``, with the same steps in torch beside it.

Token states are read in place, so no gathered copy of them is kept; of the activations only the two products of the
hidden layer are. The gradient of a combine weight comes from the hidden layer, so the experts' outputs are not kept
either (SonicMoE, https://arxiv.org/abs/2512.14080). Row counts may differ from call to call at no cost.

Shapes: T tokens, E experts, N routed copies, D model width, F feed-forward width.
"""

import ctypes
from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional

from moe_kernels.native import load_library
from moe_kernels.types import ExpertOrder, Routing, TokenOrder

Weights = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
_PANEL = 64
_P, _L, _I = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
_SIGNATURES = {
    "moe_swiglu_forward": [_P, _P, _P, _L, _L, _L, *[_P] * 7, _I],
    "moe_swiglu_backward": [*[_P] * 5, _L, _L, _L, *[_P] * 13, _I],
    "moe_sum_copies": [*[_P] * 5, _L, _L, _P, _I],
}


def _library() -> ctypes.CDLL | None:
    library = load_library("experts")
    if library is None or not library.moe_has_experts():
        return None
    if library.moe_sum_copies.argtypes is None:
        for name, signature in _SIGNATURES.items():
            getattr(library, name).argtypes = signature
    return library


def is_native(x: torch.Tensor, hidden_width: int) -> bool:
    """Whether native code takes such states.

    Args:
        x: Token states or rows ``(..., D)``.
        hidden_width: F.

    Returns:
        True for bfloat16 on a CPU whose own instructions for it are not bettered by torch's (AVX512-BF16, no AMX),
        when both widths are even.
    """
    is_fit = x.device.type == "cpu" and x.dtype == torch.bfloat16 and not (x.shape[-1] % 2 or hidden_width % 2)
    return is_fit and _library() is not None


def swiglu_rows_native(rows_ND: torch.Tensor, counts_E: torch.Tensor, weights: Weights) -> torch.Tensor:
    """`swiglu_loop` of the experts.

    Args:
        rows_ND: Rows sorted by expert ``(N, D)``.
        counts_E: Rows per expert ``(E,)``.
        weights: ``w1_EDF``, ``w3_EDF``, ``w2_EFD``, in the dtype of the rows.

    Returns:
        Expert outputs ``(N, D)``.
    """
    return _Rows.apply(rows_ND, _starts(counts_E), *weights)


def swiglu_tokens_native(
    x_TD: torch.Tensor, routing: Routing, order: ExpertOrder, by_token: TokenOrder, weights: Weights
) -> torch.Tensor:
    """Dispatch, experts and combine in one.

    Args:
        x_TD: Token states ``(T, D)``.
        routing: Where they go.
        order: Its copies by expert.
        by_token: Its copies by token.
        weights: ``w1_EDF``, ``w3_EDF``, ``w2_EFD``, in the dtype of the states.

    Returns:
        ``(T, D)``: the weighted sum of each token's experts, zero where it has none; sums are in float32, in the order
        of the routing.
    """
    plan = _Plan(
        routing.token_N, order.copy_N, order.row_N, _starts(order.counts_E), by_token.copy_N, by_token.start_T1
    )
    return _Tokens.apply(x_TD, routing.weight_N, plan, *weights)


class _Plan(NamedTuple):
    token_N: torch.Tensor
    copy_N: torch.Tensor
    row_N: torch.Tensor
    start_E1: torch.Tensor
    by_token_N: torch.Tensor
    start_T1: torch.Tensor

    @property
    def num_tokens(self) -> int:
        return self.start_T1.numel() - 1

    def sources(self) -> torch.Tensor:
        """Token of each row ``(N,)``."""
        return self.token_N[self.copy_N]


def _starts(counts_E: torch.Tensor) -> torch.Tensor:
    return functional.pad(counts_E.cumsum(0), (1, 0))


class _Rows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_ND: torch.Tensor, start_E1: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor:
        rows_ND = rows_ND.contiguous()
        weights = tuple(weight.contiguous() for weight in weights)
        out_ND, gate_NF, up_NF = _forward(rows_ND, None, start_E1, weights, keeps=any(ctx.needs_input_grad))
        ctx.save_for_backward(rows_ND, start_E1, gate_NF, up_NF, *weights)
        return out_ND

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        rows_ND, start_E1, gate_NF, up_NF, *weights = ctx.saved_tensors
        wanted = (ctx.needs_input_grad[0], False, *ctx.needs_input_grad[2:])
        grad_ND = gradients[0].contiguous()
        found = _backward(rows_ND, grad_ND, None, None, start_E1, (gate_NF, up_NF), tuple(weights), wanted)
        return found.rows_ND, None, *found.weights


class _Tokens(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_TD: torch.Tensor, weight_N: torch.Tensor, plan: _Plan, *weights: torch.Tensor
    ) -> torch.Tensor:
        x_TD = x_TD.contiguous()
        weights = tuple(weight.contiguous() for weight in weights)
        source_N = plan.sources()
        out_ND, gate_NF, up_NF = _forward(x_TD, source_N, plan.start_E1, weights, keeps=any(ctx.needs_input_grad))
        ctx.save_for_backward(x_TD, weight_N, source_N, gate_NF, up_NF, *weights)
        ctx.plan = plan
        return _sum_copies(out_ND, weight_N.detach(), plan)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x_TD, weight_N, source_N, gate_NF, up_NF, *weights = ctx.saved_tensors
        plan: _Plan = ctx.plan
        wanted = (*ctx.needs_input_grad[:2], *ctx.needs_input_grad[3:])
        by_row_N = _wide(weight_N).detach()[plan.copy_N]
        grad_TD = gradients[0].contiguous()
        kept = (gate_NF, up_NF)
        found = _backward(x_TD, grad_TD, source_N, by_row_N, plan.start_E1, kept, tuple(weights), wanted)
        d_x_TD = None if found.rows_ND is None else _sum_copies(found.rows_ND, None, plan)
        d_weight_N = None if found.weight_N is None else found.weight_N[plan.row_N].to(weight_N.dtype)
        return d_x_TD, d_weight_N, None, *found.weights


class _Found(NamedTuple):
    rows_ND: torch.Tensor | None
    weight_N: torch.Tensor | None
    weights: list[torch.Tensor | None]


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _pointers(*tensors: torch.Tensor | None) -> list[int | None]:
    return [None if tensor is None else tensor.data_ptr() for tensor in tensors]


def _check(failed: int) -> None:
    if failed:
        raise MemoryError("no memory for the experts")


def _forward(
    x: torch.Tensor,
    source_N: torch.Tensor | None,
    start_E1: torch.Tensor,
    weights: tuple[torch.Tensor, ...],
    *,
    keeps: bool,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Outputs ``(N, D)`` and, where kept, both products of the hidden layer ``(N, F)``."""
    num_experts, width, hidden_width = weights[0].shape
    if not is_native(x, hidden_width):
        return _forward_torch(x if source_N is None else x[source_N], start_E1, weights)
    library = _library()
    assert library is not None
    num_rows = len(x) if source_N is None else len(source_N)
    gate_NF, up_NF = (x.new_empty(num_rows, hidden_width) if keeps else None for _ in range(2))
    hidden_NF, out_ND = x.new_empty(num_rows, hidden_width), x.new_empty(num_rows, width)
    before, after = _pointers(x, source_N, start_E1), _pointers(*weights, gate_NF, up_NF, hidden_NF, out_ND)
    _check(library.moe_swiglu_forward(*before, num_experts, width, hidden_width, *after, torch.get_num_threads()))
    return out_ND, gate_NF, up_NF


def _backward(
    x: torch.Tensor,
    grad: torch.Tensor,
    source_N: torch.Tensor | None,
    by_row_N: torch.Tensor | None,
    start_E1: torch.Tensor,
    kept: tuple[torch.Tensor, torch.Tensor],
    weights: tuple[torch.Tensor, ...],
    wanted: tuple[bool, ...],
) -> _Found:
    """Gradients of rows, combine weights by row, and the three stacks, as ``wanted``."""
    num_experts, width, hidden_width = weights[0].shape
    if not is_native(x, hidden_width):
        gathered = (x, grad) if source_N is None else (x[source_N], grad[source_N])
        return _backward_torch(*gathered, by_row_N, start_E1, kept, weights)
    library = _library()
    assert library is not None
    num_rows = len(kept[0])
    d_gate_NF, d_up_NF, weighted_NF = (torch.empty_like(kept[0]) for _ in range(3))
    d_rows_ND = x.new_empty(num_rows, width) if wanted[0] else None
    d_weight_PN = torch.empty(-(-hidden_width // _PANEL), num_rows) if wanted[1] else None
    stacks = [
        torch.empty_like(weight) if is_wanted else None for weight, is_wanted in zip(weights, wanted[2:], strict=True)
    ]
    by_row_N = None if by_row_N is None else by_row_N.float()
    before = _pointers(x, grad, source_N, by_row_N, start_E1)
    results = (*weights, *kept, d_gate_NF, d_up_NF, weighted_NF, d_weight_PN, d_rows_ND, *stacks)
    _check(
        library.moe_swiglu_backward(
            *before, num_experts, width, hidden_width, *_pointers(*results), torch.get_num_threads()
        )
    )
    return _Found(d_rows_ND, None if d_weight_PN is None else d_weight_PN.sum(0), stacks)


def _sum_copies(rows_ND: torch.Tensor, weight_N: torch.Tensor | None, plan: _Plan) -> torch.Tensor:
    """For each token the sum of its copies' rows, times their weights."""
    width = rows_ND.shape[1]
    if not is_native(rows_ND, 2):
        copies_ND = rows_ND[plan.row_N] if weight_N is None else rows_ND[plan.row_N] * weight_N.to(rows_ND)[:, None]
        return rows_ND.new_zeros(plan.num_tokens, width).index_add_(0, plan.token_N, copies_ND)
    library = _library()
    assert library is not None
    weight_N = None if weight_N is None else weight_N.float().contiguous()
    out_TD = rows_ND.new_empty(plan.num_tokens, width)
    before = _pointers(rows_ND, plan.row_N, weight_N, plan.by_token_N, plan.start_T1)
    _check(library.moe_sum_copies(*before, plan.num_tokens, width, out_TD.data_ptr(), torch.get_num_threads()))
    return out_TD


def _forward_torch(
    rows_ND: torch.Tensor, start_E1: torch.Tensor, weights: tuple[torch.Tensor, ...]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    counts = start_E1.diff().tolist()
    w1_EDF, w3_EDF, w2_EFD = weights
    gate_NF, up_NF = (_products(rows_ND, weight, counts) for weight in (w1_EDF, w3_EDF))
    return _products(functional.silu(gate_NF) * up_NF, w2_EFD, counts), gate_NF, up_NF


def _backward_torch(
    rows_ND: torch.Tensor,
    grad_ND: torch.Tensor,
    by_row_N: torch.Tensor | None,
    start_E1: torch.Tensor,
    kept: tuple[torch.Tensor, torch.Tensor],
    weights: tuple[torch.Tensor, ...],
) -> _Found:
    counts = start_E1.diff().tolist()
    (gate_NF, up_NF), (w1_EDF, w3_EDF, w2_EFD) = kept, weights
    sigmoid_NF = torch.sigmoid(gate_NF)
    silu_NF = gate_NF * sigmoid_NF
    hidden_NF = silu_NF * up_NF
    plain_NF = _products(grad_ND, w2_EFD.mT, counts)
    scale_N1 = 1.0 if by_row_N is None else by_row_N.to(rows_ND).unsqueeze(1)
    grad_NF = plain_NF * scale_N1
    d_gate_NF = grad_NF * up_NF * sigmoid_NF * (1 + gate_NF * (1 - sigmoid_NF))
    d_up_NF = grad_NF * silu_NF
    d_rows_ND = _products(d_gate_NF, w1_EDF.mT, counts) + _products(d_up_NF, w3_EDF.mT, counts)
    pairs = ((rows_ND, d_gate_NF), (rows_ND, d_up_NF), (hidden_NF * scale_N1, grad_ND))
    stacks = [
        torch.stack([a.t() @ b for a, b in zip(left.split(counts), right.split(counts), strict=True)])
        for left, right in pairs
    ]
    return _Found(d_rows_ND, None if by_row_N is None else (_wide(plain_NF) * _wide(hidden_NF)).sum(1), [*stacks])


def _products(rows_NX: torch.Tensor, weight_EXY: torch.Tensor, counts: list[int]) -> torch.Tensor:
    return torch.cat([part @ weight for part, weight in zip(rows_NX.split(counts), weight_EXY, strict=True)])
