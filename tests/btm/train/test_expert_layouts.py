"""Data and expert parallel processes compute what one process computes: L1, L2, L3, L5, L6, L7.

All layouts of one number of processes run in the same forked processes. The reference is a single process with the same
forward passes: layers that look at a whole pass are balanced over the same tokens then, as the papers have it. Where
loads are balanced globally the reference has all sequences in one pass.
"""

import functools
import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from training_runs import fork, rank_environments, wait

from btm.config_ffn import FfnConfig
from btm.config_model import EngineConfig, ModelConfig
from btm.config_train import TrainConfig
from btm.corpus.sampler import Batch
from btm.model.causal_lm import build_model
from btm.model.sparse_lm import add_experts
from btm.train.divided_tensor import contribute_all
from btm.train.ranks import Ranks, joined_ranks
from btm.train.tensor_file import read_tensors, write_tensors
from btm.train.torch_engine import TorchEngine

pytestmark = pytest.mark.distributed
VOCABULARY, SEQUENCES, LENGTH, UPDATES = 61, 8, 10, 3
KINDS = {
    "top_k": FfnConfig(layer="top_k", num_experts=5, load_balance_weight=0.3, z_weight=0.1, shared_hidden_width=16),
    "global": FfnConfig(layer="top_k", num_experts=4, balance="global", load_balance_weight=0.3),
    "base": FfnConfig(layer="base", layers="spread_1", num_experts=4),
    "demix": FfnConfig(layer="demix", initial="random"),
    "modality": FfnConfig(layer="modality", group_sizes=[2, 2], modality_starts=[30]),
    "depths": FfnConfig(layer="modality", group_sizes=[2, 1], modality_starts=[30], depth_fraction=0.6),
    "few": FfnConfig(layer="top_k", num_experts=3, router="switch"),
}
FAST = ("top_k", "base", "demix", "modality")
Layout = tuple[int, str, int, int]
"""Processes, kind of layer, processes that share out the experts, passes of each process."""
FILES = ("model.safetensors", "optimizer.safetensors")


def engine_of(kind: str, ranks: Ranks, *, experts: int = 1, micro: int | None = None, dtype="fp32") -> TorchEngine:
    sizes = ModelConfig(num_layers=2, hidden_size=32, num_heads=2)
    model = build_model(sizes, vocab_size=VOCABULARY, eos_id=0, seed=1)
    add_experts(model, KINDS[kind], ["ants", "bees", "cats", "dogs"], seed=4)
    train = TrainConfig(sequence_length=LENGTH, clip_norm=0.5, eps=1e-3, micro_batch_sequences=micro)
    config = EngineConfig(dtype=dtype, num_processes=ranks.size, expert_parallel=experts)
    return TorchEngine(model, train=train, config=config, ranks=ranks)


def batch_of(number: int) -> Batch:
    """The last update has no sequence of domain 1, some have padding."""
    generator = np.random.default_rng(number)
    tokens = generator.integers(1, VOCABULARY, size=(SEQUENCES, LENGTH + 1))
    domain = np.resize([0, 2, 3] if number == UPDATES - 1 else [0, 1, 2, 3], SEQUENCES)
    if number != 1:
        return Batch(tokens, None, {"d": SEQUENCES * LENGTH}, domain)
    segments = np.ones(tokens.shape, dtype=np.int32)
    segments[::2, 7:] = 0
    return Batch(tokens, segments, {"d": SEQUENCES // 2 * (6 + LENGTH)}, domain)


def updates(engine: TorchEngine) -> dict:
    history = []
    for number in range(UPDATES):
        result = engine.gradients(batch_of(number), random_seed=0, stop_requested=False)
        engine.step(1e-2)
        history.append((result.loss, result.norm, *engine.expert_metrics().values()))
    return {"history": np.array(history), "moments": engine.flat.masters.numel()}


def whole_state(engine: TorchEngine, path: Path) -> dict[str, torch.Tensor]:
    """Weights, moments and steps of all experts on the main process, by way of a file as checkpoints are written."""
    files = engine.tensor_files()
    if not engine.ranks.is_main:
        contribute_all(files.values())
        return {}
    state = {}
    for name in FILES:
        write_tensors(path, files[name])
        whole = {key: torch.empty(tuple(tensor.shape)) for key, tensor in files[name].items()}
        read_tensors(path, whole)
        state |= {f"{name}/{key}": tensor for key, tensor in whole.items()}
    return state


def layouts(world: int) -> list[Layout]:
    sizes = [size for size in (1, 2, 4) if world % size == 0]
    every = itertools.product([world], KINDS, sizes, (1, 2))
    return [layout for layout in every if layout[1] != "global" or layout[3] == 1]


def is_fast(layout: Layout) -> bool:
    world, kind, experts, accumulation = layout
    return (kind in FAST and (world == 2 or (experts, accumulation) == (2, 2))) or layout == (4, "few", 4, 1)


ALL = [*layouts(2), *layouts(4)]


def run_all(directory: Path, chosen: list[Layout]) -> dict[Layout, list[dict]]:
    """What each process saw of layouts with equally many processes."""
    world = chosen[0][0]

    def work(rank: int) -> None:
        with joined_ranks() as ranks:
            found = {}
            for layout in chosen:
                _, kind, experts, accumulation = layout
                engine = engine_of(kind, ranks, experts=experts, micro=SEQUENCES // world // accumulation)
                found[layout] = updates(engine)
                found[layout]["state"] = whole_state(engine, directory / f"state-{world}-{rank}")
            torch.save(found, directory / f"{world}-{rank}.pt")

    pids = [
        fork(lambda rank=rank: work(rank), log=directory / "log.txt", env=environment)
        for rank, environment in enumerate(rank_environments(world, directory / f"rendezvous-{world}"))
    ]
    assert [wait(pid) for pid in pids] == [0] * world, (directory / "log.txt").read_text()
    ranks = [torch.load(directory / f"{world}-{rank}.pt", weights_only=False) for rank in range(world)]
    return {layout: [found[layout] for found in ranks] for layout in chosen}


@functools.cache
def single(kind: str, micro: int) -> dict:
    """A single process with passes of ``micro`` sequences."""
    engine = engine_of(kind, Ranks(), micro=micro)
    result = updates(engine)
    files = engine.tensor_files()
    return result | {"state": {f"{file}/{key}": tensor for file in FILES for key, tensor in files[file].items()}}


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> Callable[[Layout], list[dict]]:
    """Results by layout; the fast ones of one number of processes are run together, and so are the others."""
    directory = tmp_path_factory.mktemp("layouts")

    @functools.cache
    def run(world: int, fast: bool) -> dict[Layout, list[dict]]:
        return run_all(directory, [layout for layout in layouts(world) if is_fast(layout) is fast])

    return lambda layout: run(layout[0], is_fast(layout))[layout]


@pytest.mark.parametrize(
    "layout",
    [pytest.param(layout, marks=[] if is_fast(layout) else pytest.mark.slow) for layout in ALL],
    ids=lambda layout: "{}-{}-experts{}-passes{}".format(*layout),
)
def test_l1_l3_layouts_equal_one_process(found, layout):
    """L1 loss and gradients, L3 clip norm, L2 idle experts: by what clipped updates see and leave, moments included."""
    world, kind, experts, accumulation = layout
    expected = single(kind, SEQUENCES if kind == "global" else SEQUENCES // world // accumulation)
    per_rank = found(layout)
    for result in per_rank:
        np.testing.assert_array_equal(result["history"][:, :2], per_rank[0]["history"][:, :2])
        np.testing.assert_allclose(result["history"], expected["history"], rtol=1e-5)
    state = per_rank[0]["state"]
    assert state.keys() == expected["state"].keys()
    for name, tensor in expected["state"].items():
        scale = float(tensor.abs().max()) or 1.0
        torch.testing.assert_close(state[name], tensor, rtol=0, atol=1e-5 * scale, msg=name)
    assert (sum(result["moments"] for result in per_rank) < world * expected["moments"]) == (experts > 1)
