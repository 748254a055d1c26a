"""Everything that a Megatron engine imports, imported before processes are forked, so that each has it at once."""

import pytest

pytest.importorskip("megatron.core")

from btm.train.megatron_engine import MegatronEngine
from btm.train.megatron_start import imported

for name in ("models.gpt", "parallel_state", "tensor_parallel", "transformer"):
    imported(f"megatron.core.{name}")

__all__ = ["MegatronEngine"]
