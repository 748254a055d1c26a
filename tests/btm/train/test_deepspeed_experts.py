"""Expert layers under DeepSpeed compute what one process of the torch engine computes with the same passes."""

from pathlib import Path
from typing import Any

import deepspeed_ready  # noqa: F401
import numpy as np
import pytest
import torch
from layout_runs import LENGTH, VOCABULARY, Reference, assert_clips_some, check, recipe, remembering, run_layout

from btm.config_ffn import FfnConfig
from btm.config_model import EngineConfig, ModelConfig
from btm.corpus.sampler import Batch
from btm.model.causal_lm import build_model
from btm.model.sparse_lm import add_experts
from btm.train.deepspeed_engine import DeepSpeedEngine
from btm.train.engine import Engine
from btm.train.ranks import Ranks
from btm.train.torch_engine import TorchEngine
from moe_kernels.routers import HashRouter

pytestmark = pytest.mark.distributed
SEQUENCES = 8
DOMAINS = ["ants", "bees", "cats", "dogs"]
KINDS = {
    "base": FfnConfig(layer="base", layers="spread_1", num_experts=4),
    "demix": FfnConfig(layer="demix", initial="random"),
    "top_k": FfnConfig(layer="top_k", num_experts=4, load_balance_weight=0.3, z_weight=0.1, shared_hidden_width=16),
    "global": FfnConfig(layer="top_k", num_experts=4, balance="global", load_balance_weight=0.3),
    "modality": FfnConfig(layer="modality", group_sizes=[2, 2], modality_starts=[30]),
    "hash": FfnConfig(layer="top_k", num_experts=4, router="hash"),
}
CLIP = {"base": 0.9, "demix": 1.2, "top_k": 1.2, "global": 1.2, "modality": 1.2, "hash": 1.2}
"""Norms that some updates exceed and some do not."""
FP32 = {"curve": 1e-5, "norm": 1e-4, "weights": 1e-5, "moments": 1e-4}
BF16 = {"curve": 2e-2, "norm": 2e-1, "weights": 3e-2, "moments": 3e-1}


def model_of(kind: str):
    model = build_model(ModelConfig(num_layers=2, hidden_size=32, num_heads=2), vocab_size=VOCABULARY, eos_id=0, seed=1)
    add_experts(model, KINDS[kind], DOMAINS, seed=4)
    return model


def run(
    directory: Path, world: int, *, kind: str, micro: int | None = None, again: bool = False, **engine: Any
) -> dict:
    """``again`` runs blocks a second time in the backward pass."""
    config = EngineConfig(**({"dtype": "fp32", "num_processes": world} | engine))
    make_engine = TorchEngine if config.name == "torch" else DeepSpeedEngine

    def make(ranks: Ranks) -> Engine:
        train = recipe(CLIP[kind], micro).model_copy(update={"activation_checkpointing": again})
        return make_engine(model_of(kind), train=train, config=config, ranks=ranks)

    return run_layout(directory, world, make, batch_of=batch) | {"has_idle": kind in ("demix", "hash")}


def batch(number: int) -> Batch:
    """Every fourth update leaves experts 1 and 3 idle where domains or hashes decide; some have padding.

    Sequences begin with different tokens: equal states would tie, and rounding would decide who gets which expert.
    """
    number %= 4
    generator = np.random.default_rng(number)
    domain = np.resize([0, 1, 2, 3], SEQUENCES)
    known = [np.arange(1, VOCABULARY)] * SEQUENCES
    if number == 2:
        domain = np.array([0] * (SEQUENCES - 1) + [2])
        expert = HashRouter(4).expert_of(torch.arange(VOCABULARY)).numpy()
        known = [np.flatnonzero(expert == wanted) for wanted in domain]
    tokens = np.stack([generator.choice(ids, LENGTH + 1) for ids in known])
    tokens[:, 0] = [np.roll(ids, number)[place] for place, ids in enumerate(known)]
    if number != 1:
        return Batch(tokens, None, {"d": SEQUENCES * LENGTH}, domain)
    segments = np.ones(tokens.shape, dtype=np.int32)
    segments[::2, 7:] = 0
    return Batch(tokens, segments, {"d": SEQUENCES // 2 * (6 + LENGTH)}, domain)


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    """One process, the torch engine, the passes of the layout."""

    def known(directory: Path, world: int, **changes: Any) -> dict:
        right = run(directory, world, **changes)
        assert_clips_some(right, CLIP[changes["kind"]])
        return right

    return remembering(tmp_path_factory, known)


def same(ours: dict, right: dict, bounds: dict[str, float]) -> None:
    """Also the statistics of the layers, and who took which tokens; experts that were idle have made fewer steps."""
    check(ours, right, **bounds)
    if bounds is FP32:
        assert ours["metrics"] == [pytest.approx(row, rel=1e-4, abs=1e-6) for row in right["metrics"]]
        assert ours["counts"] == right["counts"]
    steps = [value for name, value in right["tensors"]["optimizer.safetensors"].items() if name.startswith("step.")]
    counts = {float(one) for value in steps for one in value.flatten()}
    assert len(counts) > 1 or not ours["has_idle"]


def layout(stage: int, experts: int, **engine: Any) -> dict[str, Any]:
    return {"name": "deepspeed", "zero_stage": stage, "expert_parallel": experts} | engine


def passes(kind: str, world: int, accumulation: int) -> int:
    """Sequences of a pass of the reference: loads that are balanced globally are those of all processes."""
    return SEQUENCES // (1 if kind == "global" else world) // accumulation


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
