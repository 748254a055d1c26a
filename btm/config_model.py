"""Keys ``model.*`` and ``engine.*``: what one model is and what runs its forward, backward and update."""

from enum import StrEnum
from typing import Any, Literal

from pydantic import Field

from btm.schema import Model


class ModelConfig(Model):
    """Architecture of a model trained from scratch, or the pretrained directory to start from."""

    path: str | None = None
    """Hugging Face causal LM directory that becomes the seed (its weights are taken); null trains from scratch."""
    arch: str = "llama"
    """Any ``model_type`` of transformers' causal LMs whose config takes the sizes below."""
    num_layers: int = Field(default=4, ge=1)
    """Transformer blocks."""
    hidden_size: int | None = Field(default=None, ge=8)
    """Width; null is 64 per layer."""
    num_heads: int | None = Field(default=None, ge=1)
    """Attention heads; null is one per 64 of width."""
    num_kv_heads: int | None = Field(default=None, ge=1)
    """Key and value heads (grouped-query attention); null is ``num_heads``."""
    intermediate_size: int | None = Field(default=None, ge=8)
    """Feed-forward width; null is 8/3 of the width rounded up to a multiple of 32."""
    max_positions: int = Field(default=2048, ge=16)
    """Longest sequence of positions."""
    tie_embeddings: bool = True
    """Share the input and output embedding."""
    extra: dict[str, Any] = {}
    """Further keys of the transformers config, taken as they are."""


class Dtype(StrEnum):
    """Arithmetic of forward and backward; master weights and optimizer state are always fp32."""

    bf16 = "bf16"
    fp32 = "fp32"


class EngineConfig(Model):
    """What runs forward, backward and the optimizer step of one model."""

    name: Literal["torch"] = "torch"
    """Engine."""
    dtype: Dtype = Dtype.bf16
    """Arithmetic of forward and backward."""
    num_processes: int = Field(default=1, ge=1)
    """Data-parallel processes per model."""
    deterministic: bool = True
    """Only algorithms that give the same bits every time."""
