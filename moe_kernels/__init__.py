"""Expert layers and their routing kernels for torch: BASE, DEMix, modality-aware, top-k.

Stands alone: imports torch only. A layer is a router, a dispatch, experts and a combine, each usable by itself.
"""

from moe_kernels.assignment import Assignment, assign_balanced, solve_assignment

__all__ = ["Assignment", "assign_balanced", "solve_assignment"]
