"""Every ZeRO stage on real processes computes what the torch engine computes on one."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import deepspeed_ready  # noqa: F401
import numpy as np
import pytest
import torch
from training_runs import fork, rank_environments, wait

from btm.config_model import EngineConfig, ModelConfig
from btm.config_train import TrainConfig
from btm.corpus.sampler import Batch
from btm.corpus.windows import Windows
from btm.model.causal_lm import build_model, load_model
from btm.train.engine import Engine
from btm.train.ranks import Ranks, joined_ranks
from btm.train.torch_engine import TorchEngine

pytestmark = pytest.mark.distributed
SEQUENCES, LENGTH, VOCABULARY, UPDATES = 5, 10, 61, 20
"""Five sequences: uneven over two processes, so that one runs a pass of padding."""
SMALL = {"zero_optimization": {"stage3_param_persistence_threshold": 0, "stage3_prefetch_bucket_size": 500}}
"""Tiny weights are cut up, too."""


def run_layout(directory: Path, world: int, *, micro: int | None = None, tie: bool = True, **engine: Any) -> dict:
    """Twenty updates on ``world`` processes; what the main one saw, all others having seen the same."""
    directory.mkdir()
    (directory / "tokenizer").mkdir()
    (directory / "tokenizer" / "tokenizer.json").write_text("{}")
    segments = engine.pop("segments", False)
    config = EngineConfig(**({"dtype": "fp32"} | engine))
    clip = 1.7 if segments else 1.2  # some updates are clipped, some are not

    def work(rank: int) -> None:
        with joined_ranks() as ranks:
            runner = engine_of(config, ranks, micro, tie, clip)
            torch.save(twenty_updates(runner, directory, segments), directory / f"{rank}.pt")

    pids = [
        fork(lambda rank=rank: work(rank), log=directory / "log.txt", env=env)
        for rank, env in enumerate(rank_environments(world, directory / "rendezvous"))
    ]
    assert [wait(pid) for pid in pids] == [0] * world, (directory / "log.txt").read_text()
    main, *others = [torch.load(directory / f"{rank}.pt") for rank in range(world)]
    for other in others:
        assert other["seen"] == main["seen"]
    return main["seen"] | {
        "clip": clip,
        "tensors": main["tensors"],
        "model": load_model(directory / "model").state_dict(),
    }


def engine_of(config: EngineConfig, ranks: Ranks, micro: int | None, tie: bool, clip: float) -> Engine:
    sizes = ModelConfig(num_layers=2, hidden_size=32, num_heads=2, tie_embeddings=tie)
    model = build_model(sizes, vocab_size=VOCABULARY, eos_id=0, seed=1)
    recipe = {"sequence_length": LENGTH, "batch_tokens": 2 * LENGTH, "micro_batch_sequences": micro}
    train = TrainConfig(**recipe, lr=1e-2, clip_norm=clip, eps=1e-3)
    if config.name == "torch":
        return TorchEngine(model, train=train, config=config, ranks=ranks)
    from btm.train.deepspeed_engine import DeepSpeedEngine

    return DeepSpeedEngine(model, train=train, config=config, ranks=ranks)


def twenty_updates(engine: Engine, directory: Path, segments: bool) -> dict:
    history = []
    for number in range(UPDATES):
        result = engine.gradients(batch(number, segments), random_seed=0, stop_requested=False)
        if number == 3:
            continue  # a skipped update leaves nothing behind
        engine.step(1e-2)
        history.append((result.loss, result.norm))
    seen = {"history": history, "dev": engine.dev_loss(windows()).loss, "steps": engine.num_optimizer_steps}
    files = engine.tensor_files()
    tensors = {file: {name: value.clone() for name, value in values.items()} for file, values in files.items()}
    engine.save_model(directory / "model", directory / "tokenizer")
    return {"seen": seen, "tensors": tensors}


def batch(number: int, segments: bool) -> Batch:
    tokens = np.random.default_rng(number % 4).integers(1, VOCABULARY, size=(SEQUENCES, LENGTH + 1))
    if not segments:
        return Batch(tokens, None, {"d": SEQUENCES * LENGTH})
    numbers = np.tile(np.repeat([1, 2, 0], [4, 5, 2]).astype(np.int32), (SEQUENCES, 1))
    return Batch(tokens, numbers, {"d": SEQUENCES * 7})


def windows() -> Windows:
    """Three windows: one process of two has nothing left in its second pass."""
    generator = np.random.default_rng(9)
    inputs, targets = generator.integers(1, VOCABULARY, size=(2, 3, LENGTH))
    targets[1, 4:] = -100
    none = np.zeros(0, dtype=np.int64)
    return Windows(inputs, targets, none, none, none, none, none)


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict]:
    """One process, the torch engine, the batch in one pass."""
    known: dict[tuple, dict] = {}

    def run(**changes: Any) -> dict:
        key = tuple(sorted(changes.items()))
        if key not in known:
            known[key] = run_layout(tmp_path_factory.mktemp("reference") / "run", 1, **changes)
        return known[key]

    return run


def check(ours: dict, reference: dict, *, curve: float, norm: float, weights: float, moments: float) -> None:
    """Compare two layouts.

    Args:
        ours: Of the layout.
        reference: Of one process.
        curve: Relative, of losses.
        norm: Relative, of gradient norms.
        weights: Share of the norm of all master weights.
        moments: Share of the norm of all moments.
    """
    assert ours["steps"] == reference["steps"] == UPDATES - 1
    (losses, norms), (right_losses, right_norms) = np.transpose(ours["history"]), np.transpose(reference["history"])
    np.testing.assert_allclose(losses, right_losses, rtol=curve)
    np.testing.assert_allclose(norms, right_norms, rtol=norm)
    assert right_norms.min() < reference["clip"] < right_norms.max()
    assert ours["dev"] == pytest.approx(reference["dev"], rel=curve)
    for file, bound in (("model.safetensors", weights), ("optimizer.safetensors", moments)):
        right = reference["tensors"][file]
        assert ours["tensors"][file].keys() == right.keys()
        flat, right_flat = (
            torch.cat([one[name].flatten() for name in right]) for one in (ours["tensors"][file], right)
        )
        assert (flat - right_flat).norm() <= bound * right_flat.norm()
    for name, value in reference["model"].items():
        assert (ours["model"][name] - value).norm() <= 5 * weights * value.norm()


FP32 = {"curve": 1e-5, "norm": 1e-4, "weights": 1e-5, "moments": 1e-4}
BF16 = {"curve": 1e-2, "norm": 1e-1, "weights": 2e-2, "moments": 2e-1}
"""The torch engine itself differs by a third of this between one process and two."""


def zero(stage: int) -> dict[str, Any]:
    return {"name": "deepspeed", "zero_stage": stage, "deepspeed": SMALL if stage == 3 else {}}


@pytest.mark.parametrize("stage", range(4))
def test_every_zero_stage_on_two_processes_gives_what_one_process_gives(tmp_path, reference, stage):
    check(run_layout(tmp_path / "run", 2, **zero(stage)), reference(), **FP32)


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
    check(run_layout(tmp_path / "run", world, **changes, **layout), right, **bounds)


@pytest.mark.slow
@pytest.mark.parametrize(("offload", "stage"), [("optimizer", 1), ("optimizer", 2), ("optimizer", 3), ("all", 3)])
def test_state_and_weights_in_cpu_memory_change_nothing(tmp_path, reference, offload, stage):
    ours = run_layout(tmp_path / "run", 2, offload=offload, micro=2, **zero(stage))
    check(ours, reference(), **FP32)
