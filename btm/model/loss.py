"""Next-token losses that never hold the logits of all tokens at once."""

import torch
from torch.nn import functional
from transformers import PreTrainedModel

IGNORED = -100


def positions_of(segments: torch.Tensor) -> torch.Tensor:
    """Positions that restart with each document.

    Args:
        segments: [B, T] document number of each token; a document's tokens are contiguous in a row.

    Returns:
        int64 [B, T], 0 for the first token of each run of equal numbers.
    """
    length = segments.shape[1]
    index = torch.arange(length, device=segments.device).expand_as(segments)
    starts = torch.ones_like(segments, dtype=torch.bool)
    starts[:, 1:] = segments[:, 1:] != segments[:, :-1]
    return index - torch.where(starts, index, 0).cummax(dim=1).values


def token_losses(
    model: PreTrainedModel,
    inputs: torch.Tensor,
    targets: torch.Tensor,
    segments: torch.Tensor | None = None,
) -> torch.Tensor:
    """Negative log-likelihood of every target, without gradients.

    Args:
        model: A causal LM.
        inputs: int64 [B, T] token ids.
        targets: int64 [B, T] next tokens; -100 is not scored.
        segments: [B, T] document number of each input; no attention crosses documents and positions restart.

    Returns:
        fp32 [B, T] nats, 0 where the target is -100.
    """
    with torch.no_grad():
        rows = []
        for row in range(inputs.shape[0]):
            part = None if segments is None else segments[row : row + 1]
            logits = _logits(model, inputs[row : row + 1], part)
            rows.append(_nll(logits, targets[row : row + 1]))
        return torch.cat(rows)


def loss_sum(
    model: PreTrainedModel,
    inputs: torch.Tensor,
    targets: torch.Tensor,
    segments: torch.Tensor | None = None,
) -> torch.Tensor:
    """Sum of the negative log-likelihoods of all targets, with gradients.

    Args:
        model: A causal LM.
        inputs: int64 [B, T] token ids.
        targets: int64 [B, T] next tokens; -100 is not counted.
        segments: [B, T] document number of each input; no attention crosses documents and positions restart.

    Returns:
        fp32 scalar, nats.
    """
    return _nll(_logits(model, inputs, segments), targets).sum()


def _nll(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    flat = functional.cross_entropy(
        logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="none"
    )
    return flat.view_as(targets)


def _logits(model: PreTrainedModel, inputs: torch.Tensor, segments: torch.Tensor | None) -> torch.Tensor:
    if segments is None:
        return model(input_ids=inputs, use_cache=False).logits
    return model(input_ids=inputs, position_ids=positions_of(segments), use_cache=False).logits
