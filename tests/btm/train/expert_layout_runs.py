"""Twenty updates of a model with expert layers, in any layout of any engine, compared with one process."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from layout_runs import (
    LENGTH,
    UPDATES,
    VOCABULARY,
    Reference,
    assert_clips_some,
    check,
    recipe,
    remembering,
    run_layout,
)
from transformers import PreTrainedModel

from btm.config_ffn import FfnConfig
from btm.config_model import EngineConfig, ModelConfig
from btm.corpus.sampler import Batch
from btm.model.causal_lm import build_model
from btm.model.sparse_lm import add_experts
from btm.train.engine import Engine
from btm.train.ranks import Ranks
from moe_kernels.routers import HashRouter

SEQUENCES = 8
_SEED = 1
"""Of batches in which every token is nearer to one expert than to the next by more than rounding."""
DOMAINS = ["ants", "bees", "cats", "dogs"]
KINDS = {
    "base": FfnConfig(layer="base", layers="spread_1", num_experts=4),
    "demix": FfnConfig(layer="demix", initial="random"),
    "top_k": FfnConfig(layer="top_k", num_experts=4, load_balance_weight=0.3, z_weight=0.1, shared_hidden_width=16),
    "global": FfnConfig(layer="top_k", num_experts=4, balance="global", load_balance_weight=0.3),
    "modality": FfnConfig(layer="modality", group_sizes=[2, 2], modality_starts=[30]),
    "hash": FfnConfig(layer="top_k", num_experts=4, router="hash"),
}
MORE = {
    "inserted": FfnConfig(layer="base", layers="spread_1", num_experts=4, num_sublayers=2, placement="inserted"),
    "depths": FfnConfig(
        layer="modality", group_sizes=[3, 1], modality_starts=[30], depth_fraction=0.6, is_noisy=True, layers=[0]
    ),
}
"""BASE behind a dense block; random numbers in a router, and a dense block beside it."""
CLIP = {"inserted": 1.0, "depths": 1.2} | {
    "base": 1.0,
    "demix": 1.2,
    "top_k": 1.2,
    "global": 1.2,
    "modality": 1.2,
    "hash": 1.2,
}
"""Norms that some updates exceed and some do not."""
FP32 = {"curve": 1e-5, "norm": 1e-4, "weights": 1e-5, "moments": 1e-4}
BF16 = {"curve": 2e-2, "norm": 2e-1, "weights": 3e-2, "moments": 3e-1}


def sparse_model(kind: str, arch: str = "llama") -> PreTrainedModel:
    """Two layers."""
    config = ModelConfig(arch=arch, num_layers=2, hidden_size=32, num_heads=2)
    model = build_model(config, vocab_size=VOCABULARY, eos_id=0, seed=1)
    return add_experts(model, (KINDS | MORE)[kind], DOMAINS, seed=4)


def run(
    directory: Path,
    world: int,
    *,
    make_engine: Callable[..., Engine],
    kind: str,
    micro: int | None = None,
    sizes: tuple[int, ...] | None = None,
    again: bool = False,
    updates: int = UPDATES,
    arch: str = "llama",
    **engine: Any,
) -> dict:
    """Train on ``world`` processes.

    Args:
        directory: A new one.
        world: Number of processes.
        make_engine: Class of the engine.
        kind: Of expert layers.
        micro: Sequences of a pass.
        sizes: The same of each pass.
        again: Run blocks a second time in the backward pass.
        updates: How many.
        arch: Of the model.
        engine: Keys of the engine.
    """
    config = EngineConfig(**({"dtype": "fp32", "num_processes": world} | engine))

    def make(ranks: Ranks) -> Engine:
        train = recipe(CLIP[kind], micro).model_copy(update={"activation_checkpointing": again})
        return make_engine(sparse_model(kind, arch), train=train, config=config, ranks=ranks, passes=sizes)

    found = run_layout(directory, world, make, batch_of=batch, updates=updates)
    return found | {"has_idle": kind in ("demix", "hash")}


def batch(number: int) -> Batch:
    """Every fourth update leaves experts 1 and 3 idle where domains or hashes decide; some have padding.

    Sequences begin with different tokens, and with two different ones: equal states would tie, and rounding would
    decide who gets which expert. (A token that begins a sequence twice has the same state at both places.)
    """
    number %= 4
    generator = np.random.default_rng(_SEED + number)
    domain = np.resize([0, 1, 2, 3], SEQUENCES)
    known = [np.arange(1, VOCABULARY)] * SEQUENCES
    if number == 2:
        domain = np.array([0] * (SEQUENCES - 1) + [2])
        expert = HashRouter(4).expert_of(torch.arange(VOCABULARY)).numpy()
        known = [np.flatnonzero(expert == wanted) for wanted in domain]
    tokens = np.stack([generator.choice(ids, LENGTH + 1) for ids in known])
    for column in (0, 1):
        tokens[:, column] = [np.roll(ids, number + column)[place] for place, ids in enumerate(known)]
    if number != 1:
        return Batch(tokens, None, {"d": SEQUENCES * LENGTH}, domain)
    segments = np.ones(tokens.shape, dtype=np.int32)
    segments[::2, 7:] = 0
    return Batch(tokens, segments, {"d": SEQUENCES // 2 * (6 + LENGTH)}, domain)


def known_references(factory: pytest.TempPathFactory, make_engine: Callable[..., Engine]) -> Reference:
    """One process of the engine, with the passes of the layout."""

    def known(directory: Path, world: int, **changes: Any) -> dict:
        right = run(directory, world, make_engine=make_engine, **changes)
        if "updates" not in changes:
            assert_clips_some(right, CLIP[changes["kind"]])
        return right

    return remembering(factory, known)


def same(ours: dict, right: dict, bounds: dict[str, float]) -> None:
    """Also the statistics of the layers, and who took which tokens; experts that were idle have made fewer steps."""
    check(ours, right, **bounds)
    if bounds is FP32:
        assert ours["metrics"] == [pytest.approx(row, rel=1e-4, abs=1e-6) for row in right["metrics"]]
        assert ours["counts"] == right["counts"]
    steps = [value for name, value in right["tensors"]["optimizer.safetensors"].items() if name.startswith("step.")]
    counts = {float(one) for value in steps for one in value.flatten()}
    assert len(counts) > 1 or not ours["has_idle"]


def passes(kind: str, world: int, accumulation: int) -> int:
    """Sequences of a pass of the reference: loads that are balanced globally are those of all processes."""
    return SEQUENCES // (1 if kind == "global" else world) // accumulation
