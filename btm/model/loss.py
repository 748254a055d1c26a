"""Next-token losses that never hold the logits of all tokens at once."""

import inspect
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel

from btm.errors import ConfigError
from btm.model.expert_pass import EXPERTS, ExpertPass
from btm.model.linear_cross_entropy import linear_cross_entropy_rows, linear_cross_entropy_sum
from btm.model.patches import SEGMENTS, carries_segments

IGNORED = -100
"""Target that is not scored."""
LINEAR_HEADS = frozenset(
    {"gemma", "gpt2", "gpt_neox", "llama", "mistral", "olmo", "olmo2", "phi3", "qwen2", "qwen3", "smollm3"}
)
"""``model_type`` of architectures whose logits are the last hidden states times the output head and nothing else.

All others go through their own forward, and their logits are in memory for one micro-batch (training) or one sequence
(scoring)."""


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
    experts: ExpertPass | None = None,
) -> torch.Tensor:
    """Negative log-likelihood of every target, without gradients.

    Args:
        model: A causal LM.
        inputs: int64 [B, T] token ids.
        targets: int64 [B, T] next tokens; -100 is not scored.
        segments: [B, T] document number of each input; no attention crosses documents and positions restart.
        experts: Labels for the expert layers of a sparse model, and their reports afterwards.

    Returns:
        fp32 [B, T] nats, 0 where the target is -100.

    Raises:
        ConfigError: If ``segments`` are given and the architecture has no positions that could restart.
    """
    with torch.no_grad():
        head = _linear_head(model)
        if head is None:
            rows = [_row_losses(model, inputs, targets, segments, row) for row in range(inputs.shape[0])]
            return torch.cat(rows)
        hidden, kept = _hidden(model, inputs, targets, segments, experts)
        losses = torch.zeros(targets.shape, dtype=torch.float32, device=targets.device)
        losses[kept] = linear_cross_entropy_rows(hidden, head, targets[kept])
        return losses


def loss_sum(
    model: PreTrainedModel,
    inputs: torch.Tensor,
    targets: torch.Tensor,
    segments: torch.Tensor | None = None,
    experts: ExpertPass | None = None,
) -> torch.Tensor:
    """Sum of the negative log-likelihoods of all targets, with gradients.

    Args:
        model: A causal LM.
        inputs: int64 [B, T] token ids.
        targets: int64 [B, T] next tokens; -100 is not counted.
        segments: [B, T] document number of each input; no attention crosses documents and positions restart.
        experts: Labels for the expert layers of a sparse model, and their reports afterwards.

    Returns:
        fp32 scalar, nats.

    Raises:
        ConfigError: If ``segments`` are given and the architecture has no positions that could restart.
    """
    head = _linear_head(model)
    if head is None:
        return _nll(_logits(model, inputs, segments), targets).sum()
    hidden, kept = _hidden(model, inputs, targets, segments, experts)
    return linear_cross_entropy_sum(hidden, head, targets[kept])


def _linear_head(model: PreTrainedModel) -> torch.Tensor | None:
    """Weight of the output head where the logits are its product with the last hidden states and nothing else."""
    head: Any = model.get_output_embeddings()
    if model.config.model_type not in LINEAR_HEADS or type(head) is not nn.Linear or head.bias is not None:
        return None
    return head.weight


def _hidden(
    model: PreTrainedModel,
    inputs: torch.Tensor,
    targets: torch.Tensor,
    segments: torch.Tensor | None,
    experts: ExpertPass | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states [R, C] of the tokens that have a target, and the mask [B, T] of these."""
    # Expert layers need architectures of LINEAR_HEADS, so that no other path has to carry the pass.
    labels = {} if experts is None else {EXPERTS: experts}
    states = model.base_model(input_ids=inputs, use_cache=False, **_segment_arguments(model, segments), **labels)
    kept = targets != IGNORED
    hidden = states.last_hidden_state
    return (hidden.flatten(0, 1) if bool(kept.all()) else hidden[kept]), kept


def _segment_arguments(model: PreTrainedModel, segments: torch.Tensor | None) -> dict[str, Any]:
    if segments is None:
        return {}
    if "position_ids" not in inspect.signature(type(model).forward).parameters:
        raise ConfigError(
            [
                f"train.packing=documents needs positions that restart, which {model.config.model_type!r} models do "
                f"not take; use train.packing=blocks"
            ]
        )
    arguments = {"position_ids": positions_of(segments)}
    if carries_segments(model):
        same = segments[:, None, :, None] == segments[:, None, None, :]
        arguments["attention_mask"] = same.tril()
        arguments[SEGMENTS] = segments.int()
    return arguments


def _row_losses(
    model: PreTrainedModel,
    inputs: torch.Tensor,
    targets: torch.Tensor,
    segments: torch.Tensor | None,
    row: int,
) -> torch.Tensor:
    part = slice(row, row + 1)
    return _nll(_logits(model, inputs[part], None if segments is None else segments[part]), targets[part])


def _nll(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    flat = functional.cross_entropy(
        logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="none"
    )
    return flat.view_as(targets)


def _logits(model: PreTrainedModel, inputs: torch.Tensor, segments: torch.Tensor | None) -> torch.Tensor:
    return model(input_ids=inputs, use_cache=False, **_segment_arguments(model, segments)).logits
