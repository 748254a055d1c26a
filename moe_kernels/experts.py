"""Experts: from rows sorted by expert to rows in the same order. Several backends of one function; modules as experts.

Shapes: E experts, N routed copies, D model width, F feed-forward width.
"""

import math
from collections.abc import Iterable

import torch
from torch import nn
from torch.nn import functional

from moe_kernels.errors import MoeError, check_choice, check_range
from moe_kernels.native_experts import is_native, swiglu_rows_native
from moe_kernels.triton_kernels.grouped import DTYPES, Weights, swiglu_rows
from moe_kernels.triton_kernels.runtime import use_triton

BACKENDS = ("auto", "loop", "grouped_mm", "triton")


def _grouped(rows_NX: torch.Tensor, weight_EXY: torch.Tensor, ends_E: torch.Tensor) -> torch.Tensor:
    return functional.grouped_mm(rows_NX, weight_EXY, offs=ends_E)


def swiglu_loop(
    rows_ND: torch.Tensor, counts_E: torch.Tensor, weights: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
) -> torch.Tensor:
    """The reference: ``(silu(x w1) * (x w3)) w2`` for one expert after the other.

    Args:
        rows_ND: Rows sorted by expert ``(N, D)``.
        counts_E: Rows per expert ``(E,)``.
        weights: ``w1_EDF``, ``w3_EDF``, ``w2_EFD``.

    Returns:
        Expert outputs ``(N, D)``.
    """
    parts = rows_ND.split(counts_E.tolist())
    # unbind, not indexing: the gradient of w[e] would be a zero tensor of the whole stack for every expert
    stacks = zip(*(weight.unbind(0) for weight in weights), strict=True)
    outputs = [
        (functional.silu(part @ w1_DF) * (part @ w3_DF)) @ w2_FD
        for part, (w1_DF, w3_DF, w2_FD) in zip(parts, stacks, strict=True)
    ]
    return torch.cat(outputs) if outputs else rows_ND


def swiglu_grouped(
    rows_ND: torch.Tensor, counts_E: torch.Tensor, weights: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
) -> torch.Tensor:
    """`swiglu_loop` by ``torch.nn.functional.grouped_mm``: float32 and bfloat16, no copy of the counts to the host.

    Args:
        rows_ND: Rows sorted by expert ``(N, D)``.
        counts_E: Rows per expert ``(E,)``.
        weights: ``w1_EDF``, ``w3_EDF``, ``w2_EFD``.

    Returns:
        Expert outputs ``(N, D)``.
    """
    w1_EDF, w3_EDF, w2_EFD = weights
    ends_E = counts_E.cumsum(0).to(torch.int32)
    hidden_NF = functional.silu(_grouped(rows_ND, w1_EDF, ends_E)) * _grouped(rows_ND, w3_EDF, ends_E)
    # grouped_mm refuses expanded gradients, such as that of a plain sum
    return _Dense.apply(_grouped(hidden_NF, w2_EFD, ends_E))


class _Dense(torch.autograd.Function):
    """Identity whose gradient is contiguous."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, value: torch.Tensor) -> torch.Tensor:
        return value.view_as(value)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *gradients: torch.Tensor) -> torch.Tensor:
        return gradients[0].contiguous()


def _fits_grouped(rows_ND: torch.Tensor, num_hidden: int) -> bool:
    size = rows_ND.element_size()
    is_aligned = rows_ND.shape[1] * size % 16 == 0 and num_hidden * size % 16 == 0
    return rows_ND.dtype in (torch.float32, torch.bfloat16) and is_aligned and rows_ND.shape[0] > 0


class SwigluExperts(nn.Module):
    """A stack of SwiGLU feed-forward networks (Shazeer 2020, https://arxiv.org/abs/2002.05202).

    Args:
        num_experts: E.
        width: Model width D.
        hidden_width: Feed-forward width F.
        backend: ``loop``, ``grouped_mm``, ``triton``, or ``auto``: Triton on CUDA devices, else native code where it is
            the fastest, else grouped_mm where it can take the rows.

    Raises:
        MoeError: If a value is out of range.
    """

    def __init__(self, num_experts: int, width: int, hidden_width: int, *, backend: str = "auto") -> None:
        super().__init__()
        check_range("num_experts", num_experts, low=1)
        check_choice("backend", backend, BACKENDS)
        self.num_experts, self.backend = num_experts, backend
        self.w1_EDF = nn.Parameter(torch.randn(num_experts, width, hidden_width) / math.sqrt(width))
        self.w3_EDF = nn.Parameter(torch.randn(num_experts, width, hidden_width) / math.sqrt(width))
        self.w2_EFD = nn.Parameter(torch.randn(num_experts, hidden_width, width) / math.sqrt(hidden_width))

    def forward(self, rows_ND: torch.Tensor, counts_E: torch.Tensor) -> torch.Tensor:
        """Apply each expert to its rows ``(N, D)``; returns ``(N, D)`` in the same order."""
        check_rows(rows_ND, counts_E, self.num_experts)
        weights = self.weights(rows_ND.dtype)
        if self.reads_in_place(rows_ND):
            return swiglu_rows(rows_ND, counts_E, weights)
        if self.is_native(rows_ND):
            return swiglu_rows_native(rows_ND, counts_E, weights)
        fits = _fits_grouped(rows_ND, weights[0].shape[2])
        if self.backend == "grouped_mm" and rows_ND.shape[0] and not fits:
            raise MoeError(
                "dtype and widths for grouped_mm",
                got=f"{rows_ND.dtype}, {tuple(weights[0].shape[1:])}",
                allowed="float32 or bfloat16, rows of a multiple of 16 bytes",
                remedy='use backend="loop" or "auto"',
            )
        is_grouped = fits and self.backend != "loop"
        return (swiglu_grouped if is_grouped else swiglu_loop)(rows_ND, counts_E, weights)

    def weights(self, dtype: torch.dtype) -> Weights:
        """The three stacks in a dtype."""
        return self.w1_EDF.to(dtype), self.w3_EDF.to(dtype), self.w2_EFD.to(dtype)

    def is_native(self, x: torch.Tensor) -> bool:
        """Whether native code does the work on such states, see `moe_kernels.native_experts`."""
        return self.backend == "auto" and is_native(x, self.w1_EDF.shape[2])

    def reads_in_place(self, x: torch.Tensor) -> bool:
        """Whether Triton does the work on such states, so that they need not be gathered first."""
        if self.backend in ("loop", "grouped_mm") or x.dtype not in DTYPES:
            return False
        return use_triton(self.backend, x)


class ExpertList(nn.Module):
    """Any modules as experts, each a map of ``(n, D)`` to ``(n, D)``.

    Experts without rows do not run: their gradients stay ``None``, so no optimizer moves them.

    Args:
        experts: The modules, in the order of expert ids.
    """

    def __init__(self, experts: Iterable[nn.Module]) -> None:
        super().__init__()
        self.experts = nn.ModuleList(experts)

    @property
    def num_experts(self) -> int:
        """Number of experts."""
        return len(self.experts)

    def forward(self, rows_ND: torch.Tensor, counts_E: torch.Tensor) -> torch.Tensor:
        """Apply each expert to its rows ``(N, D)``; returns ``(N, D)`` in the same order."""
        check_rows(rows_ND, counts_E, self.num_experts)
        parts = rows_ND.split(counts_E.tolist())
        outputs = [expert(part) for expert, part in zip(self.experts, parts, strict=True) if part.shape[0]]
        return torch.cat(outputs) if outputs else rows_ND


def check_rows(rows_ND: torch.Tensor, counts_E: torch.Tensor, num_experts: int) -> None:
    """Refuse rows that do not match their counts.

    Args:
        rows_ND: Rows ``(N, D)``.
        counts_E: Rows per expert ``(E,)``.
        num_experts: Experts there are.

    Raises:
        MoeError: If the number of counts or their sum is wrong.
    """
    if counts_E.shape != (num_experts,):
        got = tuple(counts_E.shape)
        raise MoeError("counts_E", got=got, allowed=f"({num_experts},)", remedy="route to as many experts as there are")
    if rows_ND.device.type == "cpu" and int(counts_E.sum()) != rows_ND.shape[0]:
        got = f"{rows_ND.shape[0]} rows for counts that sum to {int(counts_E.sum())}"
        raise MoeError("rows_ND", got=got, allowed="one row per count", remedy="pass what dispatch returned")


class SwigluFfn(nn.Module):
    """One SwiGLU feed-forward network, as expert of an `ExpertList` or shared by all tokens.

    Args:
        width: Model width D.
        hidden_width: Feed-forward width F.
    """

    def __init__(self, width: int, hidden_width: int) -> None:
        super().__init__()
        self.w1 = nn.Linear(width, hidden_width, bias=False)
        self.w3 = nn.Linear(width, hidden_width, bias=False)
        self.w2 = nn.Linear(hidden_width, width, bias=False)

    def forward(self, x_TD: torch.Tensor) -> torch.Tensor:
        """Map ``(..., D)`` to ``(..., D)``."""
        return self.w2(functional.silu(self.w1(x_TD)) * self.w3(x_TD))


class ResidualFfnStack(nn.Module):
    """Pre-norm residual feed-forward sublayers, without the outer residual: ``f(x) = net(x) - x``, zero at the start.

    The expert of BASE layers (https://arxiv.org/abs/2103.16716, section 4): the second matrix of each sublayer starts
    at zero, so the whole network starts as the identity.

    Args:
        width: Model width D.
        hidden_width: Feed-forward width F.
        num_sublayers: How many.
    """

    def __init__(self, width: int, hidden_width: int, num_sublayers: int = 1) -> None:
        super().__init__()
        check_range("num_sublayers", num_sublayers, low=1)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(num_sublayers))
        self.inner = nn.ModuleList(nn.Linear(width, hidden_width) for _ in range(num_sublayers))
        self.outer = nn.ModuleList(nn.Linear(hidden_width, width) for _ in range(num_sublayers))
        for linear in self.outer:
            assert isinstance(linear, nn.Linear)
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)

    def forward(self, x_TD: torch.Tensor) -> torch.Tensor:
        """Map ``(..., D)`` to the change that the network makes ``(..., D)``."""
        change_TD = torch.zeros_like(x_TD)
        for norm, inner, outer in zip(self.norms, self.inner, self.outer, strict=True):
            change_TD = change_TD + outer(functional.relu(inner(norm(x_TD + change_TD))))
        return change_TD
