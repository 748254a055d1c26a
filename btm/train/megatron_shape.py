"""What of a transformers causal LM Megatron-Core has to be told, read from the model itself; the rest is refused."""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import torch
from transformers import PreTrainedModel

from btm.config_model import MEGATRON_ARCHITECTURES
from btm.errors import ConfigError

_ROPE_TYPES = ("default", "linear", "llama3", "yarn")
"""Kinds of rotary scaling whose frequencies do not depend on the length of a sequence."""
_TORCH = "use engine=torch"


class QueryKeyNorm(StrEnum):
    """What is normalised between the projections and the rotary embedding of an attention layer."""

    none = "none"
    head = "head"
    """Each head, as in Qwen 3 (https://arxiv.org/abs/2505.09388)."""
    whole = "whole"
    """The whole projection, as in OLMo 2 (https://arxiv.org/abs/2501.00656)."""


@dataclass(frozen=True, slots=True)
class GptShape:
    """Sizes and options of a model with gated SiLU feed-forward networks, RMS norms and rotary embeddings."""

    num_layers: int
    hidden_size: int
    num_heads: int
    num_groups: int
    """Key and value heads."""
    head_size: int
    intermediate_size: int
    vocabulary: int
    """Rows of the embedding, without the padding that tensor parallelism adds."""
    norm_eps: float
    is_tied: bool
    has_post_norms: bool
    """Norms behind attention and feed-forward network (OLMo 2) rather than before."""
    query_key_norm: QueryKeyNorm
    has_qkv_bias: bool
    has_projection_bias: bool
    has_feed_forward_bias: bool
    score_scale: float
    """Factor of the attention scores."""
    padding_token: int | None
    """Token whose input embedding is not trained, as in transformers."""
    expert_blocks: frozenset[int] = frozenset()
    """Blocks whose feed-forward network gave way to experts, in its place or behind the block."""

    def padded_vocabulary(self, tensor_parallel: int) -> int:
        """Rows of the embedding with padding to a multiple of ``tensor_parallel``."""
        return -(-self.vocabulary // tensor_parallel) * tensor_parallel


def shape_of(model: PreTrainedModel, *, sequence_length: int) -> GptShape:
    """Read the shape of ``model``.

    Args:
        model: A transformers causal LM.
        sequence_length: Longest sequence that it will see.

    Raises:
        ConfigError: If the model does something that is not computed the same way under Megatron; all reasons at once.
    """
    problems = list(_problems(model, sequence_length))
    if problems:
        raise ConfigError(problems)
    config: Any = model.config
    parameters = dict(model.named_parameters())
    first = "model.layers.0"
    norm = QueryKeyNorm.none
    if f"{first}.self_attn.q_norm.weight" in parameters:
        norm = QueryKeyNorm.whole if config.model_type == "olmo2" else QueryKeyNorm.head
    head_size = _head_size(config)
    rotary: Any = model.base_model.rotary_emb
    embedding: Any = model.get_input_embeddings()
    return GptShape(
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        num_heads=config.num_attention_heads,
        num_groups=config.num_key_value_heads or config.num_attention_heads,
        head_size=head_size,
        intermediate_size=config.intermediate_size,
        vocabulary=embedding.weight.shape[0],
        norm_eps=config.rms_norm_eps,
        is_tied="lm_head.weight" not in parameters,
        has_post_norms=f"{first}.input_layernorm.weight" not in parameters,
        query_key_norm=norm,
        has_qkv_bias=f"{first}.self_attn.q_proj.bias" in parameters,
        has_projection_bias=f"{first}.self_attn.o_proj.bias" in parameters,
        has_feed_forward_bias=f"{first}.mlp.down_proj.bias" in parameters,
        # transformers multiplies queries and keys with it; Megatron rotates without.
        score_scale=float(rotary.attention_scaling) ** 2 * head_size**-0.5,
        padding_token=embedding.padding_idx,
        expert_blocks=frozenset(
            number
            for number in range(config.num_hidden_layers)
            if f"model.layers.{number}.mlp.down_proj.weight" not in parameters
        ),
    )


def frequencies_of(model: PreTrainedModel) -> torch.Tensor:
    """Frequencies of the rotary embedding as transformers computed them, with scaling, fp32 ``(head_size / 2,)``."""
    rotary: Any = model.base_model.rotary_emb
    return rotary.inv_freq.float()


def check_division(
    shape: GptShape,
    tensor_parallel: int,
    *,
    is_sequence_parallel: bool,
    sequence_length: int,
    expert_width: int | None = None,
) -> None:
    """Refuse what ``tensor_parallel`` processes cannot share out; the vocabulary is padded and always divides.

    Args:
        shape: Of the model.
        tensor_parallel: Number of processes.
        is_sequence_parallel: Whether they share out the sequence, too.
        sequence_length: Tokens.
        expert_width: Feed-forward width of one expert; None for a model without any.

    Raises:
        ConfigError: With every size that does not divide.
    """
    sizes = {"attention heads": shape.num_heads, "key and value heads": shape.num_groups}
    if len(shape.expert_blocks) < shape.num_layers:
        sizes["the feed-forward width"] = shape.intermediate_size
    if expert_width is not None:
        sizes["the feed-forward width of an expert, ffn.hidden_width,"] = expert_width
    if is_sequence_parallel:
        sizes["train.sequence_length, with engine.sequence_parallel=true,"] = sequence_length
    problems = [
        f"engine.tensor_parallel={tensor_parallel} must divide {what} ({size}); use one that does"
        for what, size in sizes.items()
        if size % tensor_parallel
    ]
    if problems:
        raise ConfigError(problems)


def _problems(model: PreTrainedModel, sequence_length: int) -> Iterator[str]:
    config: Any = model.config
    if config.model_type not in MEGATRON_ARCHITECTURES:
        yield f"engine=megatron trains {', '.join(MEGATRON_ARCHITECTURES)} models, got {config.model_type!r}; {_TORCH}"
        return
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    if frozen:
        yield f"engine=megatron trains all weights, this model has frozen ones ({frozen[0]}); {_TORCH}"
    if config.hidden_act not in ("silu", "swish"):
        yield f"engine=megatron computes SwiGLU, the model has hidden_act={config.hidden_act!r}; {_TORCH}"
    if getattr(config, "attention_dropout", 0.0):
        yield f"engine=megatron has no dropout, the model has attention_dropout={config.attention_dropout}; set it to 0"
    rope_type = (config.rope_parameters or {}).get("rope_type", "default")
    if rope_type not in _ROPE_TYPES:
        yield f"engine=megatron knows the rope types {', '.join(_ROPE_TYPES)}, the model has {rope_type!r}; {_TORCH}"
    elif 2 * len(frequencies_of(model)) != _head_size(config):
        yield f"engine=megatron rotates whole heads ({_head_size(config)}), the model a part of each; {_TORCH}"
    if _window(config) < sequence_length:
        yield (
            f"engine=megatron attends to whole sequences, the model to a window of {_window(config)} tokens and "
            f"train.sequence_length is {sequence_length}; make that no longer, or {_TORCH}"
        )


def _head_size(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _window(config: Any) -> float:
    """Tokens that every attention layer sees at least."""
    layers = getattr(config, "layer_types", None)
    is_sliding = "sliding_attention" in layers if layers else config.model_type == "mistral"
    window = getattr(config, "sliding_window", None)
    return window if is_sliding and window is not None else float("inf")
