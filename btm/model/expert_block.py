"""Transformer blocks with an expert layer: in the place of the feed-forward network, or behind the block.

A block of a transformers model is turned into a subclass of its own class, whose forward takes the pass
(:mod:`btm.model.expert_pass`) from its keyword arguments and lends it to its expert layer for the time of the call.
All of it lies inside of what activation checkpointing runs again.
"""

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from btm.model.expert_pass import EXPERTS, ExpertPass, ExpertPassError
from moe_kernels import LayerOutput
from moe_kernels.layers import MixtureOfDepths

BEHIND = "behind"
"""Attribute of a block that holds an expert layer behind it; its parameters have this in their names."""


class ExpertLayerModule(nn.Module):
    """An expert layer inside a transformers model: a map of hidden states that reports to the pass of the call.

    Args:
        layer: A layer of :mod:`moe_kernels`.
        block: Number of the block.
    """

    def __init__(self, layer: nn.Module, block: int) -> None:
        super().__init__()
        self.layer, self.block = layer, block
        self._pass: ExpertPass | None = None

    @contextlib.contextmanager
    def lent(self, experts: ExpertPass) -> Iterator[None]:
        """Work for ``experts`` inside the block; calls may be nested."""
        before, self._pass = self._pass, experts
        try:
            yield
        finally:
            self._pass = before

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Map [B, T, C] to [B, T, C].

        Raises:
            ExpertPassError: Outside of the model.
        """
        if self._pass is None:
            raise ExpertPassError("expert layers ran outside of their model; call the model itself")
        output: LayerOutput = self.layer(hidden_states, self._pass.info)
        self._pass.record(self.block, output)
        return output.hidden

    @property
    def experts(self) -> Any:
        """The experts of the layer, with their number in ``num_experts``."""
        layer = self.layer.layer if isinstance(self.layer, MixtureOfDepths) else self.layer
        return layer.get_submodule("experts")  # pyright: ignore[reportCallIssue, reportAttributeAccessIssue]


class NoFeedForward(nn.Module):
    """Takes the place of a feed-forward network that gave way to an expert layer behind its block; returns zeros."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Zeros of the shape of ``hidden_states``."""
        return torch.zeros_like(hidden_states)


def make_expert_block(block: nn.Module, *, mlp: nn.Module | None = None, behind: nn.Module | None = None) -> None:
    """Turn a block of a transformers model into one with an expert layer, in place.

    Args:
        block: A decoder layer with its feed-forward network under ``mlp``.
        mlp: What replaces the feed-forward network; None keeps it.
        behind: What follows the block; it has its residual connection inside.
    """
    if mlp is not None:
        block.mlp = mlp
    if behind is not None:
        setattr(block, BEHIND, behind)
    block.__class__ = _expert_block_class(type(block))


def expert_modules(model: nn.Module) -> list[ExpertLayerModule]:
    """The expert layers of a model, by block."""
    return sorted((m for m in model.modules() if isinstance(m, ExpertLayerModule)), key=lambda module: module.block)


def supply_pass(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict]:
    """Forward pre-hook of a base model: begins the pass of the call, a new one where the caller gave none.

    Raises:
        ExpertPassError: If the model is called with embeddings instead of token ids.
    """
    token_ids = args[0] if args else kwargs.get("input_ids")
    if token_ids is None:
        raise ExpertPassError("a model with expert layers needs input_ids; embeddings alone do not say which tokens")
    experts = kwargs.get(EXPERTS) or ExpertPass(is_real=_padding(kwargs.get("attention_mask"), token_ids))
    if getattr(module, "needs_domain", False) and experts.domain is None:
        raise ExpertPassError(
            "a DEMix model needs the domain of each sequence: ExpertPass(domain=...); without one, take the model of "
            "one domain (load_model(..., domain=...)) or mix those of all"
        )
    experts.begin(token_ids, getattr(module, "modality_starts", None))
    return args, {**kwargs, EXPERTS: experts}


def _padding(attention_mask: torch.Tensor | None, token_ids: torch.Tensor) -> torch.Tensor | None:
    """Mask of real tokens, where the mask is the plain one of transformers; with a KV cache its end belongs to now."""
    if attention_mask is None or attention_mask.ndim != 2:
        return None
    return attention_mask[:, -token_ids.shape[1] :].bool()


@functools.cache
def _expert_block_class(block_class: type[nn.Module]) -> type[nn.Module]:
    class ExpertBlock(block_class):
        def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            experts = kwargs.pop(EXPERTS)
            modules = [m for m in (self.mlp, getattr(self, BEHIND, None)) if isinstance(m, ExpertLayerModule)]
            with contextlib.ExitStack() as stack:
                for module in modules:
                    stack.enter_context(module.lent(experts))
                hidden_states = super().forward(hidden_states, *args, **kwargs)
                behind = getattr(self, BEHIND, None)
                return hidden_states if behind is None else behind(hidden_states)

    ExpertBlock.__name__ = ExpertBlock.__qualname__ = f"Expert{block_class.__name__}"
    return ExpertBlock
