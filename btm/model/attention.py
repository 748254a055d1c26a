"""Causal self-attention by plain matrix products, faster on CPUs than the fused kernel up to a few thousand tokens.

Rows are processed in a few blocks, and each block multiplies only the columns that it may attend. Probabilities are
kept for the gradient, so memory grows with the square of the length; longer sequences and GPUs take torch's own
``scaled_dot_product_attention``.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from btm.model.native import usable

LONGEST = 2048
"""Tokens per sequence up to which the matrix products are used."""
_MAX_BLOCKS = 4
_MIN_BLOCK = 64


def _blocks(length: int) -> Iterator[tuple[int, int]]:
    size = max(_MIN_BLOCK, -(-length // _MAX_BLOCKS))
    return ((begin, min(begin + size, length)) for begin in range(0, length, size))


def _softmax(scores: torch.Tensor, begin: int, segments: torch.Tensor | None, heads: int) -> torch.Tensor:
    rows, cols = scores.shape[1:]
    native = usable(scores)
    if native:
        part = None if segments is None else segments[:, :cols].int().contiguous()
        native.call("softmax_forward", scores.dtype, scores, scores.shape[0], rows, cols, begin, part, heads)
        return scores
    index = torch.arange(cols, device=scores.device)
    hidden = index[None, None, :] > index[None, begin:, None]
    if segments is not None:
        seen = segments[:, :cols]
        hidden = (hidden | (seen[:, None, :] != seen[:, begin:, None])).repeat_interleave(heads, dim=0)
    return torch.softmax(scores.masked_fill_(hidden, float("-inf")), dim=-1)


def _softmax_gradient(probabilities: torch.Tensor, grad: torch.Tensor, begin: int) -> torch.Tensor:
    native = usable(grad)
    if native:
        native.call("softmax_backward", grad.dtype, probabilities, grad, *grad.shape, begin)
        return grad
    return torch.ops.aten._softmax_backward_data(grad, probabilities, -1, grad.dtype)


class _CausalAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        segments: torch.Tensor | None,
        scaling: float,
    ) -> torch.Tensor:
        batch, heads, length, width = query.shape
        q, k, v = (query * scaling).flatten(0, 1), key.flatten(0, 1).contiguous(), value.flatten(0, 1).contiguous()
        out = query.new_empty(batch, length, heads, width)
        saved = []
        for begin, end in _blocks(length):
            scores = torch.bmm(q[:, begin:end], k[:, :end].transpose(1, 2))
            saved.append(_softmax(scores, begin, segments, heads))
            part = torch.bmm(saved[-1], v[:, :end])
            out[:, begin:end] = part.view(batch, heads, end - begin, width).transpose(1, 2)
        if any(ctx.needs_input_grad):
            ctx.save_for_backward(q, k, v, *saved)
        ctx.scaling = scaling
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        q, k, v, *saved = ctx.saved_tensors
        grad = grads[0].transpose(1, 2).flatten(0, 1).contiguous()
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for (begin, end), probabilities in zip(_blocks(q.shape[1]), saved, strict=True):
            part = grad[:, begin:end]
            dv[:, :end].baddbmm_(probabilities.transpose(1, 2), part)
            dscores = _softmax_gradient(probabilities, torch.bmm(part, v[:, :end].transpose(1, 2)), begin)
            dq[:, begin:end] = torch.bmm(dscores, k[:, :end])
            dk[:, :end].baddbmm_(dscores.transpose(1, 2), q[:, begin:end])
        batch, length, heads, width = grads[0].shape
        dq, dk, dv = (item.view(batch, heads, length, width) for item in (dq.mul_(ctx.scaling), dk, dv))
        return dq, dk, dv, None, None


def causal_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    scaling: float,
    segments: torch.Tensor | None = None,
) -> torch.Tensor:
    """Softmax attention in which every token sees itself and what comes before it in its document.

    Args:
        query: [B, H, T, D].
        key: [B, G, T, D]; H is a multiple of G (grouped-query attention, https://arxiv.org/abs/2305.13245).
        value: Like ``key``.
        scaling: Factor of the scores.
        segments: int [B, T] document number of each token, contiguous in a row; None is one document per row.

    Returns:
        [B, T, H, D]. Scores and probabilities have the type of ``query``; sums are in fp32.

    Raises:
        ValueError: If shapes do not fit.
    """
    batch, heads, length, width = query.shape
    groups = heads // key.shape[1]
    if key.shape != (batch, heads // groups, length, width) or value.shape != key.shape:
        raise ValueError(f"key {list(key.shape)} and value {list(value.shape)} do not fit query {list(query.shape)}")
    if segments is not None and segments.shape != (batch, length):
        raise ValueError(f"segments must be [{batch}, {length}], got {list(segments.shape)}")
    if groups > 1:
        key, value = (item.repeat_interleave(groups, dim=1) for item in (key, value))
    return _CausalAttention.apply(query, key, value, segments, scaling)
