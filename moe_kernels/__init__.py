"""Expert layers and their routing kernels for torch: BASE, DEMix, modality-aware, top-k.

Stands alone: imports torch only. A layer is a router, a dispatch, experts and a combine, each usable by itself.
"""

from moe_kernels.assignment import Assignment, assign_balanced, solve_assignment
from moe_kernels.causality import CausalityReport, check_causality
from moe_kernels.errors import MoeError
from moe_kernels.layers import EXPERT_LAYERS, BaseConfig, DemixConfig, ModalityConfig, SkillConfig, TopKConfig
from moe_kernels.types import LayerOutput, Routing, RoutingStatistics, TokenInfo

__all__ = [
    "EXPERT_LAYERS",
    "Assignment",
    "BaseConfig",
    "CausalityReport",
    "DemixConfig",
    "LayerOutput",
    "ModalityConfig",
    "MoeError",
    "Routing",
    "RoutingStatistics",
    "SkillConfig",
    "TokenInfo",
    "TopKConfig",
    "assign_balanced",
    "check_causality",
    "solve_assignment",
]
