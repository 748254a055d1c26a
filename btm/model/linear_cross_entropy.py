"""Output head and cross-entropy in one, chunk by chunk, so that the logits of all tokens never exist together.

The gradient of a chunk's logits is computed while the chunk is at hand, and only the gradients of the hidden states
and of the head are kept (after the fused linear cross-entropy of https://arxiv.org/abs/2410.10989).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from btm.model.native import usable

ChunkLosses = Callable[[torch.Tensor, torch.Tensor, bool], torch.Tensor]
"""Logits [R, V], targets [R] and whether to overwrite the logits by their gradient -> nats of each row."""
_CHUNK_ELEMENTS = 1 << 25


def _chunk_rows(vocab_size: int) -> int:
    return max(16, _CHUNK_ELEMENTS // vocab_size)


def _check(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, is_whole: bool) -> None:
    if hidden.dtype != weight.dtype or targets.shape != hidden.shape[:1] or targets.dtype != torch.int64:
        raise ValueError(
            f"hidden {hidden.dtype} {list(hidden.shape)}, weight {weight.dtype} and targets {targets.dtype} "
            f"{list(targets.shape)} do not fit: hidden and weight share a type, targets are one int64 per row"
        )
    vocab_size = weight.shape[0]
    if is_whole and targets.numel() and not 0 <= int(targets.min()) <= int(targets.max()) < vocab_size:
        raise ValueError(
            f"targets must be in 0 ... {vocab_size - 1}, got {int(targets.min())} ... {int(targets.max())}; tokens and "
            f"model belong to different vocabularies"
        )


def _losses(logits: torch.Tensor, targets: torch.Tensor, write_grad: bool) -> torch.Tensor:
    """Nats of each row; with ``write_grad`` the logits are overwritten by their gradient."""
    native = usable(logits)
    if native:
        losses = torch.empty(logits.shape[0])
        native.call("cross_entropy", logits.dtype, logits, targets.contiguous(), losses, *logits.shape, int(write_grad))
        return losses
    wide = logits if logits.dtype == torch.float64 else logits.float()
    log_sum = torch.logsumexp(wide, dim=-1, keepdim=True)
    losses = (log_sum - wide.gather(1, targets[:, None]))[:, 0]
    if write_grad:
        gradient = torch.exp(wide - log_sum)
        gradient.scatter_add_(1, targets[:, None], torch.full_like(log_sum, -1.0))
        logits.copy_(gradient)
    return losses


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, losses: ChunkLosses
    ) -> torch.Tensor:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        total = torch.zeros((), dtype=wide, device=hidden.device)
        dhidden = torch.empty_like(hidden)
        rows = _chunk_rows(weight.shape[0])
        # One chunk needs no sum in fp32.
        dweight = torch.zeros_like(weight, dtype=wide if hidden.shape[0] > rows else weight.dtype)
        for begin in range(0, hidden.shape[0], rows):
            part = slice(begin, begin + rows)
            logits = torch.mm(hidden[part], weight.t())
            total += losses(logits, targets[part], True).sum()
            torch.mm(logits, weight, out=dhidden[part])
            if hidden.shape[0] > rows:
                dweight += torch.mm(logits.t(), hidden[part])
            else:
                torch.mm(logits.t(), hidden, out=dweight)
        ctx.save_for_backward(dhidden, dweight.to(weight.dtype))
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        dhidden, dweight = ctx.saved_tensors
        if grads[0].device.type == "cpu" and grads[0].item() == 1.0:
            return dhidden, dweight, None, None
        scale = grads[0]
        return (dhidden * scale).to(dhidden.dtype), (dweight * scale).to(dweight.dtype), None, None


def linear_cross_entropy_sum(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, losses: ChunkLosses | None = None
) -> torch.Tensor:
    """Sum over rows of the cross-entropy of ``hidden @ weight.T`` against ``targets``.

    Args:
        hidden: [R, C].
        weight: [V, C] of the same type.
        targets: int64 [R], each in 0 ... V - 1.
        losses: What knows the rest of the vocabulary, where ``weight`` has a part of it; it judges ``targets``, too.

    Returns:
        Scalar in nats, fp32 (fp64 for fp64 inputs).

    Raises:
        ValueError: If a target is not in the vocabulary.
    """
    _check(hidden, weight, targets, losses is None)
    if torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad):
        return _LinearCrossEntropy.apply(hidden, weight, targets, losses or _losses)
    return linear_cross_entropy_rows(hidden, weight, targets, losses).sum()


def linear_cross_entropy_rows(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, losses: ChunkLosses | None = None
) -> torch.Tensor:
    """Cross-entropy of each row, without gradients; arguments as in :func:`linear_cross_entropy_sum`.

    Returns:
        [R] nats, fp32 (fp64 for fp64 inputs).

    Raises:
        ValueError: If a target is not in the vocabulary.
    """
    _check(hidden, weight, targets, losses is None)
    with torch.no_grad():
        rows = _chunk_rows(weight.shape[0])
        parts = [
            (losses or _losses)(
                torch.mm(hidden[begin : begin + rows], weight.t()), targets[begin : begin + rows], False
            )
            for begin in range(0, hidden.shape[0], rows)
        ]
        return torch.cat(parts) if parts else hidden.new_zeros(0, dtype=torch.float32)
