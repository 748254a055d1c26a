"""Every ZeRO stage on real processes computes what the torch engine computes on one."""

from pathlib import Path
from typing import Any

import deepspeed_ready  # noqa: F401
import pytest
from layout_runs import VOCABULARY, Reference, assert_clips_some, batch, check, recipe, remembering, run_layout

from btm.config_model import EngineConfig, ModelConfig
from btm.model.causal_lm import build_model
from btm.train.engine import Engine
from btm.train.ranks import Ranks
from btm.train.torch_engine import TorchEngine

pytestmark = pytest.mark.distributed
SMALL = {"zero_optimization": {"stage3_param_persistence_threshold": 0, "stage3_prefetch_bucket_size": 500}}
"""Tiny weights are cut up, too."""


FP32 = {"curve": 1e-5, "norm": 1e-4, "weights": 1e-5, "moments": 1e-4}
BF16 = {"curve": 1e-2, "norm": 1e-1, "weights": 2e-2, "moments": 2e-1}
"""The torch engine itself differs by a third of this between one process and two."""


def run(
    directory: Path, world: int, *, micro: int | None = None, tie: bool = True, segments: bool = False, **engine: Any
) -> dict:
    config = EngineConfig(**({"dtype": "fp32"} | engine))

    def make(ranks: Ranks) -> Engine:
        sizes = ModelConfig(num_layers=2, hidden_size=32, num_heads=2, tie_embeddings=tie)
        model = build_model(sizes, vocab_size=VOCABULARY, eos_id=0, seed=1)
        train = recipe(clip_of(segments), micro)
        if config.name == "torch":
            return TorchEngine(model, train=train, config=config, ranks=ranks)
        from btm.train.deepspeed_engine import DeepSpeedEngine

        return DeepSpeedEngine(model, train=train, config=config, ranks=ranks)

    return run_layout(directory, world, make, batch_of=lambda number: batch(number, segments))


def clip_of(segments: bool) -> float:
    return 1.7 if segments else 1.2


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    """One process, the torch engine, the batch in one pass."""

    def known(directory: Path, world: int, **changes: Any) -> dict:
        right = run(directory, world, **changes)
        assert_clips_some(right, clip_of(changes.get("segments", False)))
        return right

    return remembering(tmp_path_factory, known)


def zero(stage: int) -> dict[str, Any]:
    return {"name": "deepspeed", "zero_stage": stage, "deepspeed": SMALL if stage == 3 else {}}


@pytest.mark.parametrize("stage", range(4))
def test_every_zero_stage_on_two_processes_gives_what_one_process_gives(tmp_path, reference, stage):
    check(run(tmp_path / "run", 2, **zero(stage)), reference(), **FP32)


CASES = [
    pytest.param({"micro": 1}, FP32, id="micro-batches"),
    pytest.param({"micro": 1, "dtype": "bf16"}, BF16, id="bf16"),
    pytest.param({"tie": False, "segments": True, "micro": 2}, FP32, id="documents-untied"),
]


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("stage", [None, 0, 1, 2, 3])
@pytest.mark.parametrize(("changes", "bounds"), CASES)
def test_micro_batches_bf16_and_packed_documents_in_every_layout(tmp_path, reference, changes, bounds, stage, world):
    layout = {"name": "torch"} if stage is None else zero(stage)
    right = reference(**{key: value for key, value in changes.items() if key != "micro"})
    check(run(tmp_path / "run", world, **changes, **layout), right, **bounds)


@pytest.mark.slow
@pytest.mark.parametrize(("offload", "stage"), [("optimizer", 1), ("optimizer", 2), ("optimizer", 3), ("all", 3)])
def test_state_and_weights_in_cpu_memory_change_nothing(tmp_path, reference, offload, stage):
    ours = run(tmp_path / "run", 2, offload=offload, micro=2, **zero(stage))
    check(ours, reference(), **FP32)
