"""Expert layers in Megatron-Core's layer specification: the layers of the transformers model, with Megatron's states.

A block takes the pass of the call (:mod:`btm.model.expert_pass`) together with the documents of its tokens, where
Megatron passes a mask, and lends it to its expert layer; so it has it again where activation checkpointing runs it
again. Tensor-parallel processes share out the width of every expert (:mod:`btm.train.megatron_expert_width`) and
compute all else of a layer alike, from the same tokens, so that they agree on who takes which token.
"""

import contextlib
import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from btm.model.expert_block import BEHIND, ExpertLayerModule, NoFeedForward
from btm.model.expert_pass import ExpertPass
from btm.train.megatron_modules import RmsNorm
from btm.train.megatron_start import imported


@dataclass(frozen=True, slots=True)
class TokenLabels:
    """What the blocks of a model with expert layers are told of the tokens."""

    segments: torch.Tensor | None
    """int [B, T] document of each token, or None."""
    experts: ExpertPass


@dataclass(frozen=True, slots=True)
class BlockExperts:
    """What of expert layers one block has; nothing of it for a dense block."""

    mlp: ExpertLayerModule | NoFeedForward | None = None
    """What took the place of the feed-forward network."""
    behind: ExpertLayerModule | None = None
    """What follows the block."""

    @staticmethod
    def of(model: PreTrainedModel) -> "list[BlockExperts]":
        """Of each block of a transformers model."""
        blocks: Any = model.base_model.layers
        return [
            BlockExperts(
                mlp=block.mlp if isinstance(block.mlp, (ExpertLayerModule, NoFeedForward)) else None,
                behind=getattr(block, BEHIND, None),
            )
            for block in blocks
        ]


class ExpertStates(nn.Module):
    """A module of a transformers block, a map of [B, T, C], for the states of a Megatron block.

    Processes that share out the sequence bring it together first, because routers may look at all tokens, and go on
    with their parts; the gradient of what lies between is then whole on each of them.
    """

    def __init__(self, module: nn.Module, config: Any, *, has_norm: bool = False) -> None:
        """Wrap ``module``.

        Args:
            module: Shared with the transformers model.
            config: Megatron's.
            has_norm: Whether the output is normalised (OLMo 2).
        """
        super().__init__()
        self.module = module
        self.norm = RmsNorm(config, config.hidden_size, config.layernorm_epsilon) if has_norm else None
        self._is_shared_out = config.sequence_parallel and not isinstance(module, NoFeedForward)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """Map [T, B, C], or this process's part of the sequence, to the same."""
        mappings = imported("megatron.core.tensor_parallel.mappings") if self._is_shared_out else None
        if mappings is not None:
            states = mappings.gather_from_sequence_parallel_region(states, tensor_parallel_output_grad=False)
        output = self.module(states.transpose(0, 1)).transpose(0, 1).contiguous()
        if mappings is not None:
            output = mappings.scatter_to_sequence_parallel_region(output)
        return output if self.norm is None else self.norm(output)


class ExpertFeedForward(ExpertStates):
    """What stands under ``mlp`` in the specification of a block without a feed-forward network of its own."""

    def forward(self, states: torch.Tensor, **options: Any) -> tuple[torch.Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Output and no bias, as Megatron's ``MLP`` returns them; there are no options."""
        del options
        return super().forward(states), None


@functools.cache
def with_experts(layer: type[nn.Module]) -> type[nn.Module]:
    """A transformer layer of a model with expert layers, whose mask is :class:`TokenLabels`.

    Args:
        layer: Megatron's class.
    """

    class ExpertLayer(layer):
        def __init__(self, *arguments: Any, config: Any, behind: ExpertLayerModule | None, **options: Any) -> None:
            super().__init__(*arguments, config=config, **options)
            self.behind = None if behind is None else ExpertStates(behind, config)

        def forward(
            self, hidden_states: torch.Tensor, attention_mask: TokenLabels, **options: Any
        ) -> tuple[torch.Tensor, Any]:
            with contextlib.ExitStack() as stack:
                for wrapped in (self.mlp, self.behind):
                    if isinstance(wrapped, ExpertStates) and isinstance(wrapped.module, ExpertLayerModule):
                        stack.enter_context(wrapped.module.lent(attention_mask.experts))
                states, context = super().forward(hidden_states, attention_mask=attention_mask.segments, **options)
                return (states if self.behind is None else self.behind(states)), context

    return ExpertLayer
