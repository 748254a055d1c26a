"""Expert layers under DeepSpeed compute what one process of the torch engine computes with the same passes."""

from pathlib import Path
from typing import Any

import deepspeed_ready  # noqa: F401
import expert_layout_runs
import pytest
from expert_layout_runs import BF16, FP32, KINDS, SEQUENCES, known_references, passes, same
from layout_runs import Reference

from btm.train.deepspeed_engine import DeepSpeedEngine
from btm.train.torch_engine import TorchEngine

pytestmark = pytest.mark.distributed


def run(directory: Path, world: int, **changes: Any) -> dict:
    return expert_layout_runs.run(directory, world, make_engine=DeepSpeedEngine, **changes)


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    """One process, the torch engine, the passes of the layout."""
    return known_references(tmp_path_factory, TorchEngine)


def layout(stage: int, experts: int, **engine: Any) -> dict[str, Any]:
    return {"name": "deepspeed", "zero_stage": stage, "expert_parallel": experts} | engine


QUICK = [("top_k", 2, 2, 2), ("demix", 1, 2, 1)]
EVERY = [
    (kind, stage, experts, accumulation)
    for kind in KINDS
    for stage in (0, 1, 2)
    for experts in (1, 2)
    for accumulation in (1, 2)
    if kind != "global" or accumulation == 1
]


@pytest.mark.parametrize(
    ("kind", "stage", "experts", "accumulation"),
    [pytest.param(*case, marks=[] if case in QUICK else pytest.mark.slow) for case in EVERY],
)
def test_two_processes_give_what_one_process_gives(tmp_path, reference, kind, stage, experts, accumulation):
    right = reference(kind=kind, micro=passes(kind, 2, accumulation))
    ours = run(tmp_path / "run", 2, kind=kind, micro=SEQUENCES // 2 // accumulation, **layout(stage, experts))
    same(ours, right, FP32)


SMALL_BUCKETS = {"deepspeed": {"zero_optimization": {"reduce_bucket_size": 3000, "allgather_bucket_size": 3000}}}
"""Gradients are exchanged many times in one backward pass, which shows whether they arrive in the same order."""
CASES = [
    ("demix", 4, layout(2, 2, **SMALL_BUCKETS), FP32),
    ("top_k", 4, layout(1, 2), FP32),
    ("demix", 2, layout(2, 1, **SMALL_BUCKETS), FP32),
    ("hash", 2, layout(2, 2, **SMALL_BUCKETS), FP32),
    ("modality", 2, layout(2, 2, again=True, **SMALL_BUCKETS), FP32),
    ("demix", 2, layout(1, 2, offload="optimizer"), FP32),
    ("top_k", 2, layout(2, 2, offload="optimizer"), FP32),
    ("demix", 2, layout(0, 2, dtype="bf16"), BF16),
    ("demix", 2, layout(1, 2, dtype="bf16"), BF16),
    ("demix", 2, layout(2, 2, dtype="bf16"), BF16),
]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "world", "changes", "bounds"), CASES)
def test_four_processes_small_buckets_offload_bf16_and_blocks_run_again(
    tmp_path, reference, kind, world, changes, bounds
):
    right = reference(kind=kind, micro=passes(kind, world, 1), dtype=changes.get("dtype", "fp32"))
    same(run(tmp_path / "run", world, kind=kind, **changes), right, bounds)
