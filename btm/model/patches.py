"""Fast paths put into the modules of a transformers model at run time, and taken out again.

Three things happen, each only where it is known to compute the same function:

* modules whose class is in :data:`FAST_FORWARDS` get our forward;
* models that run torch's ``sdpa`` attention get :func:`attention_forward` through transformers' attention interface;
* parameters, not buffers, are moved to the training type: rotary frequencies must stay in fp32.

Everything else of any architecture runs as transformers wrote it. Nothing of this is saved with a model.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaForCausalLM, LlamaMLP, LlamaRMSNorm
from transformers.models.mistral.modeling_mistral import MistralMLP, MistralRMSNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2MLP, Qwen2RMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3MLP, Qwen3RMSNorm

from btm.model.attention import LONGEST, causal_attention
from btm.model.elementwise import rms_norm, rotary, swiglu

ATTENTION_NAME = "btm"
SEGMENTS = "btm_segments"
"""Keyword argument that carries document numbers to patched attention modules."""
_UNSUPPORTED = ("softcap", "s_aux", "position_bias", "cache")


def _norm_forward(self: Any, hidden_states: torch.Tensor) -> torch.Tensor:
    if hidden_states.dtype != self.weight.dtype:
        return type(self).forward(self, hidden_states)
    return rms_norm(hidden_states, self.weight, self.variance_epsilon)


def _mlp_forward(self: Any, x: torch.Tensor) -> torch.Tensor:
    return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))


def _attention_module_forward(
    self: Any,
    hidden_states: torch.Tensor,
    position_embeddings: tuple[torch.Tensor, torch.Tensor],
    attention_mask: torch.Tensor | None = None,
    past_key_values: Any = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    segments = kwargs.pop(SEGMENTS, None)
    batch, length, _ = hidden_states.shape
    hidden_by_mask = attention_mask is not None and segments is None
    dropout = self.training and self.attention_dropout > 0
    if hidden_by_mask or past_key_values is not None or dropout or not _by_products(hidden_states, length):
        return type(self).forward(self, hidden_states, position_embeddings, attention_mask, past_key_values, **kwargs)
    shape = (batch, length, -1, self.head_dim)
    query = rotary(self.q_proj(hidden_states).view(shape), *position_embeddings)
    key = rotary(self.k_proj(hidden_states).view(shape), *position_embeddings)
    value = self.v_proj(hidden_states).view(shape).transpose(1, 2)
    mixed = causal_attention(query, key, value, scaling=self.scaling, segments=segments)
    return self.o_proj(mixed.view(batch, length, -1)), None


FAST_FORWARDS: dict[type[nn.Module], Callable[..., Any]] = {
    LlamaAttention: _attention_module_forward,
    LlamaMLP: _mlp_forward,
    LlamaRMSNorm: _norm_forward,
    MistralMLP: _mlp_forward,
    MistralRMSNorm: _norm_forward,
    Qwen2MLP: _mlp_forward,
    Qwen2RMSNorm: _norm_forward,
    Qwen3MLP: _mlp_forward,
    Qwen3RMSNorm: _norm_forward,
}
"""Module class -> forward of ours that computes the same function. Matched exactly, never by inheritance."""


def attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention for transformers' interface: ours for plain causal self-attention on a CPU, torch's for the rest.

    Args:
        module: The attention module.
        query: [B, H, T, D].
        key: [B, G, S, D].
        value: Like ``key``.
        attention_mask: Whatever ``sdpa`` takes; None is causal.
        kwargs: ``scaling``, ``dropout``, ``is_causal`` and what an architecture adds.

    Returns:
        [B, T, H, D] and None (no attention weights).
    """
    kwargs.pop(SEGMENTS, None)
    causal = kwargs.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    plain = attention_mask is None and causal and query.shape[2] == key.shape[2] == value.shape[2]
    plain = plain and not kwargs.get("dropout") and all(kwargs.get(name) is None for name in _UNSUPPORTED)
    if not plain or query.shape[3] != value.shape[3] or not _by_products(query, query.shape[2]):
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    scaling = kwargs.get("scaling")
    scaling = query.shape[3] ** -0.5 if scaling is None else scaling
    return causal_attention(query, key, value, scaling=scaling), None


@dataclass
class Preparation:
    """What :func:`prepare_for_training` did to a model."""

    model: PreTrainedModel
    attention: str | None
    """The attention implementation before."""
    patched: list[nn.Module] = field(default_factory=list)

    def undo(self) -> None:
        """Give the model its own forwards and attention back; type and device stay. Idempotent."""
        for module in self.patched:
            module.__dict__.pop("forward", None)
        self.patched.clear()
        self.model.config._attn_implementation = self.attention


def prepare_for_training(
    model: PreTrainedModel, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> Preparation:
    """Move ``model`` to ``device``, its parameters to ``dtype``, and put the fast paths in.

    Works for training and for scoring without gradients. The parameters stay the same objects, so that optimizers
    made before stay valid; buffers keep their type.

    Args:
        model: Any transformers causal LM.
        device: Where it will run.
        dtype: Type of the parameters; None leaves it. Keep fp32 masters yourself when this is bf16.

    Returns:
        A handle whose ``undo`` takes the fast paths out again.
    """
    for parameter in model.parameters():
        parameter.data = parameter.data.to(device, dtype if parameter.is_floating_point() else parameter.dtype)
    nn.Module.to(model, device)
    done = Preparation(model, model.config._attn_implementation)
    for module in model.modules():
        fast = FAST_FORWARDS.get(type(module))
        if fast is not None and "forward" not in module.__dict__ and _fits(module):
            module.__dict__["forward"] = functools.partial(fast, module)
            done.patched.append(module)
    if done.attention == "sdpa":
        AttentionInterface.register(ATTENTION_NAME, attention_forward)
        AttentionMaskInterface.register(ATTENTION_NAME, sdpa_mask)
        model.config._attn_implementation = ATTENTION_NAME
    return done


def carries_segments(model: PreTrainedModel) -> bool:
    """Whether every attention module of ``model`` is patched with one that understands :data:`SEGMENTS`."""
    attentions = [module for module in model.modules() if isinstance(module, LlamaAttention)]
    return type(model) is LlamaForCausalLM and all(
        type(module) in FAST_FORWARDS and "forward" in module.__dict__ for module in attentions
    )


def _fits(module: nn.Module) -> bool:
    """Whether the settings of ``module`` are those that our forward computes."""
    activation = getattr(module, "act_fn", None)
    return activation is None or type(activation).__name__ in {"SiLUActivation", "SiLU"}


def _by_products(tensor: torch.Tensor, length: int) -> bool:
    return tensor.device.type == "cpu" and length <= LONGEST
