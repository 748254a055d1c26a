"""RMSNorm, SwiGLU and rotary embedding as autograd functions with hand-written gradients.

Each has a native one-pass path for bf16 and fp32 on the CPU and a torch path for everything else (other types, GPUs,
machines without a compiler). ``btm/model/reference.py`` has the obvious versions that both must equal.
"""

from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional

from btm.model.native import usable

_NORM_BLOCKS = 64


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        rows = x.reshape(-1, x.shape[-1]).contiguous()
        native = usable(rows)
        if native:
            y = torch.empty_like(rows)
            scale = torch.empty(rows.shape[0], 1)
            native.call("rms_forward", x.dtype, rows, weight, y, scale, *rows.shape, eps)
        else:
            wide = _wide(rows)
            scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
            y = (wide * scale * weight).to(x.dtype)
        ctx.save_for_backward(rows, weight, scale)
        return y.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        rows, weight, scale = ctx.saved_tensors
        grad = grads[0].reshape(rows.shape).contiguous()
        native = usable(rows)
        if native:
            dx = torch.empty_like(rows)
            partial = torch.zeros(_NORM_BLOCKS, rows.shape[1])
            native.call("rms_backward", rows.dtype, grad, rows, weight, scale, dx, partial, *rows.shape, _NORM_BLOCKS)
            dweight = partial.sum(0)
        else:
            normed = _wide(rows) * scale
            dweight = (_wide(grad) * normed).sum(0)
            inner = _wide(grad) * weight
            dx = (scale * (inner - normed * (inner * normed).mean(-1, keepdim=True))).to(rows.dtype)
        return dx.view(grads[0].shape), dweight.to(weight.dtype), None


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Root-mean-square norm over the last dimension, times ``weight`` (https://arxiv.org/abs/1910.07467).

    Args:
        x: [..., C].
        weight: [C], of x's type.
        eps: Added to the mean square.

    Returns:
        [..., C] of x's type; sums are in fp32.

    Raises:
        ValueError: If shapes or types do not fit.
    """
    if weight.shape != x.shape[-1:] or weight.dtype != x.dtype:
        raise ValueError(f"weight {weight.dtype} {list(weight.shape)} does not fit x {x.dtype} {list(x.shape)}")
    return _RmsNorm.apply(x, weight.contiguous(), eps)


class _SwiGlu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        gate, up = gate.contiguous(), up.contiguous()
        ctx.save_for_backward(gate, up)
        native = usable(gate)
        if not native:
            return functional.silu(gate) * up
        out = torch.empty_like(gate)
        native.call("swiglu_forward", gate.dtype, gate, up, out, gate.numel())
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        gate, up = ctx.saved_tensors
        grad = grads[0].contiguous()
        native = usable(gate)
        if not native:
            return torch.ops.aten.silu_backward(grad * up, gate), grad * functional.silu(gate)
        dgate, dup = torch.empty_like(gate), torch.empty_like(up)
        native.call("swiglu_backward", gate.dtype, grad, gate, up, dgate, dup, gate.numel())
        return dgate, dup


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """``silu(gate) * up`` (https://arxiv.org/abs/2002.05202); both of one shape and type, else a ``ValueError``."""
    if gate.shape != up.shape or gate.dtype != up.dtype:
        raise ValueError(f"gate {gate.dtype} {list(gate.shape)} and up {up.dtype} {list(up.shape)} must be alike")
    return _SwiGlu.apply(gate, up)


def _rotate_half(x: torch.Tensor) -> torch.Tensor:
    low, high = x.chunk(2, dim=-1)
    return torch.cat((-high, low), dim=-1)


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        cos, sin = cos.contiguous(), sin.contiguous()
        ctx.save_for_backward(cos, sin)
        native = usable(x)
        if not native:
            moved = x.transpose(1, 2)
            return (moved * cos[:, None] + _rotate_half(moved) * sin[:, None]).contiguous()
        batch, length, heads, width = x.shape
        out = x.new_empty(batch, heads, length, width)
        stride = 0 if cos.shape[0] == 1 else length * width
        native.call("rotate", x.dtype, x.contiguous(), cos, sin, out, *x.shape[:2], heads, width, stride, 0)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        cos, sin = ctx.saved_tensors
        grad = grads[0]
        native = usable(grad)
        if not native:
            dx = grad * cos[:, None] - _rotate_half(grad * sin[:, None])
            return dx.transpose(1, 2).contiguous(), None, None
        batch, heads, length, width = grad.shape
        dx = grad.new_empty(batch, length, heads, width)
        stride = 0 if cos.shape[0] == 1 else length * width
        native.call("rotate", grad.dtype, grad.contiguous(), cos, sin, dx, batch, length, heads, width, stride, 1)
        return dx, None, None


def rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary position embedding (https://arxiv.org/abs/2104.09864), moving heads before positions.

    Args:
        x: [B, T, H, D] queries or keys.
        cos: [B or 1, T, D] of x's type; the halves of D are rotated against each other.
        sin: Like ``cos``.

    Returns:
        [B, H, T, D], contiguous.

    Raises:
        ValueError: If shapes or types do not fit.
    """
    batch, length, _, width = x.shape
    allowed = [(1, length, width), (batch, length, width)]
    if cos.shape not in allowed or sin.shape != cos.shape or not cos.dtype == sin.dtype == x.dtype or width % 2:
        raise ValueError(f"cos and sin {cos.dtype} {list(cos.shape)} do not fit x {x.dtype} {list(x.shape)}")
    return _Rotary.apply(x, cos, sin)
