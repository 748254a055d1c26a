"""Sizes and costs known before anything runs: parameters, FLOPs, bytes and updates, computed without torch.

A run has ``U = tokens / batch`` updates. The seed phase takes ``s * U`` of them with the whole batch; afterwards every
ELM takes the other ``(1 - s) * U`` updates with an equal share of the batch, so that seed phase and ELMs together see
as many tokens as a dense model trained for ``U`` updates (Branch-Train-Merge, https://arxiv.org/abs/2208.03306).
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from btm.config_model import ModelConfig
from btm.config_train import TrainConfig
from btm.files import read_json


@dataclass(frozen=True, slots=True)
class ModelSize:
    """What the cost of a model depends on."""

    num_parameters: int
    """All weights."""
    num_matmul_parameters: int
    """Weights that multiply every token: without the input embedding, with the output head."""
    num_layers: int
    attention_width: int
    """Heads times head width."""

    def flops_per_token(self, sequence_length: int) -> float:
        """Training FLOPs (forward and backward) per token: 6 per matmul weight plus attention over the sequence."""
        attention = 12 * self.num_layers * self.attention_width * sequence_length
        return 6.0 * self.num_matmul_parameters + attention

    @property
    def checkpoint_bytes(self) -> int:
        """Bytes of one training checkpoint: fp32 master weights and two Adam moments."""
        return 12 * self.num_parameters


@dataclass(frozen=True, slots=True)
class Updates:
    """How the updates of a run divide between seed phase and ELMs."""

    total: int
    seed: int
    batch_sequences: int
    """Sequences per update of the seed and dense models."""
    elm_batch_sequences: int
    """Sequences per update of one ELM."""

    @property
    def elm(self) -> int:
        """Updates of one ELM."""
        return self.total - self.seed


def resolved_sizes(config: ModelConfig) -> dict[str, int]:
    """Fill in the sizes that ``config`` leaves to the rules in :class:`btm.config_model.ModelConfig`."""
    width = config.hidden_size or 64 * config.num_layers
    heads = config.num_heads or max(1, width // 64)
    feed_forward = config.intermediate_size or -(-width * 8 // 3 // 32) * 32
    return {
        "hidden_size": width,
        "num_attention_heads": heads,
        "num_key_value_heads": config.num_kv_heads or heads,
        "intermediate_size": feed_forward,
        "num_hidden_layers": config.num_layers,
    }


def model_size(config: ModelConfig, vocab_size: int) -> ModelSize:
    """Size of a Llama-type model (gated feed-forward, no biases) of these dimensions.

    For a pretrained directory the sizes come from its ``config.json``. Architectures with other feed-forward layers
    differ by some per cent; the ledger of a finished run counts the real parameters.
    """
    if config.path:
        sizes, vocab_size, tied = _pretrained_sizes(read_json(Path(config.path) / "config.json"))
    else:
        sizes, tied = resolved_sizes(config), config.tie_embeddings
    width, layers = sizes["hidden_size"], sizes["num_hidden_layers"]
    head_width = sizes.get("head_dim") or width // sizes["num_attention_heads"]
    attention_width = head_width * sizes["num_attention_heads"]
    key_value_width = head_width * sizes["num_key_value_heads"]
    block = 2 * width * attention_width + 2 * width * key_value_width + 3 * width * sizes["intermediate_size"]
    embedding = vocab_size * width
    norms = (2 * layers + 1) * width
    return ModelSize(
        num_parameters=layers * block + norms + embedding * (1 if tied else 2),
        num_matmul_parameters=layers * block + embedding,
        num_layers=layers,
        attention_width=attention_width,
    )


def divide_updates(train: TrainConfig, num_elms: int) -> Updates:
    """Divide ``train.tokens`` between the seed phase and ``num_elms`` ELMs.

    The batch is rounded down to a multiple of ``num_elms`` sequences, so that every model of the run sees equal tokens.
    """
    sequences = train.batch_tokens // train.sequence_length
    elm_sequences = max(1, sequences // max(1, num_elms))
    sequences = elm_sequences * max(1, num_elms)
    total = max(1, train.tokens // (sequences * train.sequence_length))
    return Updates(
        total=total,
        seed=round(total * train.seed_fraction),
        batch_sequences=sequences,
        elm_batch_sequences=elm_sequences,
    )


def _pretrained_sizes(raw: dict[str, Any]) -> tuple[dict[str, int], int, bool]:
    width = raw.get("hidden_size") or raw["n_embd"]
    heads = raw.get("num_attention_heads") or raw["n_head"]
    sizes = {
        "hidden_size": width,
        "num_attention_heads": heads,
        "num_key_value_heads": raw.get("num_key_value_heads") or heads,
        "intermediate_size": raw.get("intermediate_size") or raw.get("n_inner") or 4 * width,
        "num_hidden_layers": raw.get("num_hidden_layers") or raw["n_layer"],
        "head_dim": raw.get("head_dim") or 0,
    }
    return sizes, raw["vocab_size"], raw.get("tie_word_embeddings", True)
