"""Blocks that run again in the backward pass change memory and nothing else, under every engine."""

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from training_runs import fork, rank_environments, wait

from btm.config_ffn import FfnConfig
from btm.config_model import EngineConfig, ModelConfig
from btm.config_parse import parse_config
from btm.config_train import TrainConfig
from btm.corpus.sampler import Batch
from btm.errors import ConfigError
from btm.model.activation_checkpointing import checkpoint_activations
from btm.model.causal_lm import build_model
from btm.model.sparse_lm import add_experts
from btm.train.divided_tensor import contribute_all
from btm.train.engine import Engine
from btm.train.ranks import Ranks, joined_ranks
from btm.train.tensor_file import write_tensors
from btm.train.torch_engine import TorchEngine

if importlib.util.find_spec("deepspeed"):
    import deepspeed_ready  # noqa: F401
if importlib.util.find_spec("megatron"):
    import megatron_ready  # noqa: F401

LENGTH, SEQUENCES, VOCABULARY, UPDATES = 32, 8, 61, 3
SPARSE = {
    "top_k": FfnConfig(layer="top_k", num_experts=4, balance="global", load_balance_weight=0.3, z_weight=0.1),
    "base": FfnConfig(layer="base", layers="spread_1", num_experts=4),
    "demix": FfnConfig(layer="demix", initial="random"),
    "modality": FfnConfig(layer="modality", group_sizes=[2, 2], modality_starts=[30], auxiliary_weight=0.2),
    "depths": FfnConfig(layer="modality", group_sizes=[2, 1], modality_starts=[30], depth_fraction=0.6, is_noisy=True),
}
HALVES = {"num_processes": 2, "expert_parallel": 2}
PARTS = {"tensor_parallel": 2, "sequence_parallel": True}


def case(name: str, world: int = 1, kind: str = "", is_slow: bool = False, **engine: Any):
    marks = [pytest.mark.slow] if is_slow else []
    if name != "torch":
        library = {"deepspeed": "deepspeed", "megatron": "megatron"}[name]
        marks.append(pytest.mark.skipif(not importlib.util.find_spec(library), reason=f"no {library}"))
    shown = "-".join([name, kind or "dense", *(f"{key}={value}" for key, value in engine.items())])
    return pytest.param(world, kind, {"name": name, **engine}, id=shown, marks=marks)


CASES = [
    case("torch"),
    case("torch", dtype="bf16", is_slow=True),
    *(case("torch", kind=kind, is_slow=kind not in ("base", "top_k")) for kind in SPARSE),
    *(case("torch", 2, kind, is_slow=kind != "top_k", **HALVES) for kind in SPARSE),
    *(case("deepspeed", 2, zero_stage=stage, is_slow=stage < 3) for stage in range(4)),
    case("deepspeed", zero_stage=3, dtype="bf16", is_slow=True),
    *(case("deepspeed", 2, kind, zero_stage=2, is_slow=True) for kind in SPARSE),
    *(case("deepspeed", 2, kind, zero_stage=2, is_slow=True, **HALVES) for kind in ("top_k", "base", "demix")),
    case("megatron", is_slow=True),
    case("megatron", dtype="bf16", is_slow=True),
    case("megatron", 2, **PARTS),
    *(case("megatron", kind=kind, is_slow=True) for kind in SPARSE),
    *(case("megatron", 2, kind, is_slow=kind != "depths", **PARTS) for kind in SPARSE),
]


class Held:
    """A tensor that autograd keeps; adds up the bytes of all that live."""

    bytes = peak = 0

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor
        Held.bytes += tensor.nbytes
        Held.peak = max(Held.peak, Held.bytes)

    def __del__(self) -> None:
        Held.bytes -= self.tensor.nbytes


@contextmanager
def counted_bytes() -> Iterator[None]:
    Held.bytes = Held.peak = 0
    with torch.autograd.graph.saved_tensors_hooks(Held, lambda held: held.tensor):
        yield


def engine_of(kind: str, config: EngineConfig, ranks: Ranks, *, is_checkpointed: bool) -> Engine:
    sizes = ModelConfig(num_layers=4, hidden_size=32, num_heads=2)
    model = build_model(sizes, vocab_size=VOCABULARY, eos_id=0, seed=1)
    if kind:
        add_experts(model, SPARSE[kind], ["ants", "bees"], seed=4)
    train = TrainConfig(
        sequence_length=LENGTH,
        clip_norm=0.5,
        eps=1e-3,
        micro_batch_sequences=2,
        activation_checkpointing=is_checkpointed,
    )
    if config.name == "torch":
        return TorchEngine(model, train=train, config=config, ranks=ranks)
    if config.name == "megatron":
        from btm.train.megatron_engine import MegatronEngine

        return MegatronEngine(model, train=train, config=config, ranks=ranks)
    from btm.train.deepspeed_engine import DeepSpeedEngine

    return DeepSpeedEngine(model, train=train, config=config, ranks=ranks)


def batch_of(number: int) -> Batch:
    tokens = np.random.default_rng(number).integers(1, VOCABULARY, size=(SEQUENCES, LENGTH + 1))
    return Batch(tokens, None, {"d": SEQUENCES * LENGTH}, np.arange(SEQUENCES) % 2)


def some_updates(engine: Engine, directory: Path) -> dict[str, Any]:
    """Losses, norms, statistics and bytes held; weights and moments as files of the main process."""
    directory.mkdir(exist_ok=True)
    history, metrics = [], []
    with counted_bytes():
        for number in range(UPDATES):
            result = engine.gradients(batch_of(number), random_seed=0, stop_requested=False)
            engine.step(1e-2)
            history.append((result.loss, result.norm))
            metrics.append(dict(engine.expert_metrics()))
    files = engine.tensor_files()
    if engine.ranks.is_main:
        for name, tensors in files.items():
            write_tensors(directory / name, tensors)
    else:
        contribute_all(files.values())
    return {"history": history, "metrics": metrics, "peak": Held.peak}


@pytest.mark.distributed
@pytest.mark.parametrize(("world", "kind", "engine"), CASES)
def test_the_same_losses_gradients_and_weights_from_less_memory(tmp_path, world, kind, engine):
    config = EngineConfig(**({"dtype": "fp32", "num_processes": world} | engine))

    def work(rank: int) -> None:
        with joined_ranks() as ranks:
            found = [
                some_updates(engine_of(kind, config, ranks, is_checkpointed=again), tmp_path / str(again))
                for again in (False, True)
            ]
            torch.save(found, tmp_path / f"{rank}.pt")

    environments = rank_environments(world, tmp_path / "rendezvous")
    pids = [
        fork(lambda rank=rank: work(rank), log=tmp_path / "log.txt", env=env) for rank, env in enumerate(environments)
    ]
    assert [wait(pid) for pid in pids] == [0] * world, (tmp_path / "log.txt").read_text()
    assert "checkpointing" not in (tmp_path / "log.txt").read_text()  # no advice of the libraries
    for rank in range(world):
        plain, again = torch.load(tmp_path / f"{rank}.pt")
        assert again["history"] == plain["history"]
        assert again["metrics"] == plain["metrics"]
        assert again["peak"] < 0.5 * plain["peak"], (again["peak"], plain["peak"])
    for name in ("model.safetensors", "optimizer.safetensors"):
        assert (tmp_path / "True" / name).read_bytes() == (tmp_path / "False" / name).read_bytes()


def test_what_cannot_run_blocks_again_is_refused(monkeypatch):
    model = build_model(ModelConfig(num_layers=1), vocab_size=VOCABULARY, eos_id=0, seed=1)
    monkeypatch.setattr(type(model), "supports_gradient_checkpointing", False)
    with pytest.raises(ConfigError, match=r"'llama' model does not have; leave it false"):
        checkpoint_activations(model)
    with pytest.raises(ConfigError, match=r"train\.activation_checkpointing must be a boolean|valid boolean"):
        parse_config({"train": {"activation_checkpointing": "some"}})
