"""The table of expert layers: a name, the configuration that builds the layer, the paper.

A new layer is one file beside this one and one line in the table.
"""

from dataclasses import dataclass

from moe_kernels.layers.base_layer import BaseConfig, BaseLayer, base_layer_positions
from moe_kernels.layers.demix import DemixConfig, DemixLayer, freeze_except, mix_domains
from moe_kernels.layers.depths import MixtureOfDepths
from moe_kernels.layers.modality import ModalityConfig, ModalityLayer
from moe_kernels.layers.routed import RoutedLayer, TopKConfig
from moe_kernels.layers.skills import SkillConfig, SkillLayer

__all__ = [
    "EXPERT_LAYERS",
    "BaseConfig",
    "BaseLayer",
    "DemixConfig",
    "DemixLayer",
    "LayerEntry",
    "MixtureOfDepths",
    "ModalityConfig",
    "ModalityLayer",
    "RoutedLayer",
    "SkillConfig",
    "SkillLayer",
    "TopKConfig",
    "base_layer_positions",
    "freeze_except",
    "mix_domains",
]


@dataclass(frozen=True, kw_only=True)
class LayerEntry:
    """One row of the table."""

    config: type
    """Dataclass with a ``build()`` that returns the layer."""
    reference: str
    """Where the layer is described."""


EXPERT_LAYERS: dict[str, LayerEntry] = {
    "base": LayerEntry(config=BaseConfig, reference="https://arxiv.org/abs/2103.16716"),
    "demix": LayerEntry(config=DemixConfig, reference="https://arxiv.org/abs/2108.05036"),
    "modality": LayerEntry(config=ModalityConfig, reference="https://arxiv.org/abs/2407.21770"),
    "skills": LayerEntry(config=SkillConfig, reference="https://arxiv.org/abs/2205.06126"),
    "top_k": LayerEntry(config=TopKConfig, reference="https://arxiv.org/abs/1701.06538"),
}
