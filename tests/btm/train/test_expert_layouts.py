"""Data and expert parallel processes compute what one process computes: L1, L2, L3, L5, L6, L7.

All layouts of one number of processes run in the same forked processes. The reference is a single process with the same
forward passes: layers that look at a whole pass are balanced over the same tokens then, as the papers have it. Where
loads are balanced globally the reference has all sequences in one pass.
"""

import functools
import itertools
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from training_runs import fork, rank_environments, wait

from btm.config_ffn import FfnConfig
from btm.config_model import EngineConfig, ModelConfig, engine_problems
from btm.config_train import TrainConfig
from btm.corpus.sampler import Batch
from btm.errors import ConfigError
from btm.model.causal_lm import build_model
from btm.model.sparse_lm import add_experts
from btm.train.divided_tensor import contribute_all
from btm.train.expert_passes import order_by_expert, passes_of, passes_of_rank
from btm.train.ranks import Ranks, joined_ranks
from btm.train.tensor_file import read_tensors, write_tensors
from btm.train.torch_engine import TorchEngine
from moe_kernels import expert_parallel
from moe_kernels.exchange import exchange
from moe_kernels.routers import HashRouter

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
    "hash": FfnConfig(layer="top_k", num_experts=4, router="hash"),
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
    """Of the last update, experts 1 and 3 get nothing where domains or hashes decide, and expert 2 one sequence."""
    generator = np.random.default_rng(number)
    tokens = generator.integers(1, VOCABULARY, size=(SEQUENCES, LENGTH + 1))
    domain = np.resize([0, 1, 2, 3], SEQUENCES)
    if number == UPDATES - 1:
        domain = np.array([0] * (SEQUENCES - 1) + [2])
        expert = HashRouter(4).expert_of(torch.arange(VOCABULARY)).numpy()
        tokens = np.stack([generator.choice(np.flatnonzero(expert == wanted), LENGTH + 1) for wanted in domain])
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
    is_usual = kind in FAST and (world == 2 or (experts, accumulation) == (2, 2))
    return is_usual or layout in ((4, "few", 4, 1), (4, "hash", 2, 1))


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


@pytest.mark.parametrize("kind", ["hash", "demix"])
def test_l2_idle_experts_of_stacks_and_lists_keep_weights_moments_and_steps(kind):
    """Neither momentum nor weight decay moves an expert that no token of the update reached; all others move."""
    engine = engine_of(kind, Ranks())
    for number in range(UPDATES):
        before = {f"{file}/{name}": t.clone() for file, ts in engine.tensor_files().items() for name, t in ts.items()}
        engine.gradients(batch_of(number), random_seed=0, stop_requested=False)
        engine.step(1e-2)
    checked = 0
    for file, tensors in engine.tensor_files().items():
        for name, tensor in tensors.items():
            moved = tensor != before[f"{file}/{name}"]
            if "experts" not in name:
                assert moved.any() or "step" in name, name
                continue
            parts = enumerate(moved) if kind == "hash" else [(int(name.split("experts.experts.")[1][0]), moved)]
            for expert, part in parts:
                assert bool(part.any()) == (expert in (0, 2)), (file, name, expert)
                checked += 1
    # Two blocks of four experts: three matrices with two moments each, and the number of steps.
    assert checked == 2 * 4 * (3 * 3 + 1)
    steps = engine.tensor_files()["optimizer.safetensors"]
    counts = [tensor for name, tensor in sorted(steps.items()) if name.startswith("step.")]
    assert torch.cat([count.reshape(-1) for count in counts]).tolist() == [3.0, 2.0, 3.0, 2.0] * 2


def test_a_number_of_processes_that_does_not_divide_is_refused():
    with pytest.raises(
        ConfigError, match=r"engine.expert_parallel \(2\) must divide the number of processes, which is 1"
    ):
        engine_of("top_k", Ranks(), experts=2)


@pytest.mark.parametrize(
    ("engine", "is_sparse", "expected"),
    [
        ({"num_processes": 4, "expert_parallel": 2}, True, None),
        ({"num_processes": 4, "expert_parallel": 3}, True, "engine.expert_parallel=3 must divide the 4 processes"),
        ({"num_processes": 2, "expert_parallel": 2}, False, "engine.expert_parallel=2 needs expert layers"),
        (
            {"name": "deepspeed", "num_processes": 2, "expert_parallel": 2},
            False,
            "engine.expert_parallel=2 needs expert layers",
        ),
        (
            {"name": "deepspeed", "num_processes": 3, "expert_parallel": 2},
            True,
            "engine.expert_parallel=2 must divide the 3 processes",
        ),
        ({"name": "deepspeed", "num_processes": 2, "expert_parallel": 2}, True, None),
        (
            {"name": "deepspeed", "zero_stage": 3},
            True,
            "engine.zero_stage=3 trains dense models only, got expert layers (ffn); set engine.zero_stage to 0, 1 or 2",
        ),
        (
            {"name": "megatron", "num_processes": 2, "expert_parallel": 2},
            False,
            "engine.expert_parallel=2 needs expert layers",
        ),
    ],
)
def test_contradictions_are_named_before_training(engine, is_sparse, expected):
    problems = engine_problems(EngineConfig(**engine), is_sparse=is_sparse)
    assert [problem.startswith(expected or "") for problem in problems] == ([] if expected is None else [True])


def test_passes_are_whole_for_any_number_of_processes():
    for sequences, processes, micro in itertools.product(range(1, 14), range(1, 6), (None, 1, 2, 3)):
        sizes = passes_of(sequences, processes, micro)
        assert sum(sizes) == sequences
        assert min(sizes) >= 1
        assert max(sizes) <= (micro or sequences)
        shares = [passes_of_rank(len(sizes), rank, processes) for rank in range(processes)]
        assert [number for share in shares for number in share] == list(range(len(sizes)))
    assert passes_of(8, 4, None) == passes_of(8, 1, 2) == passes_of(8, 2, 2) == [2, 2, 2, 2]


def test_tokens_of_a_balanced_demix_batch_stay_where_they_are(tmp_path):
    def work(rank: int) -> None:
        sent = []

        def recorded(rows, send, receive, group):
            sent.append([count for other, count in enumerate(send) if other != rank])
            return exchange(rows, send, receive, group)

        expert_parallel.exchange = recorded
        with joined_ranks() as ranks:
            engine = engine_of("demix", ranks, experts=2)
            engine.gradients(batch_of(0), random_seed=0, stop_requested=False)
        (tmp_path / f"{rank}.json").write_text(json.dumps(sent))

    pids = [
        fork(lambda rank=rank: work(rank), log=tmp_path / "log.txt", env=environment)
        for rank, environment in enumerate(rank_environments(2, tmp_path / "rendezvous"))
    ]
    assert [wait(pid) for pid in pids] == [0, 0], (tmp_path / "log.txt").read_text()
    # To the experts and back, in two blocks.
    assert [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)] == [[[0]] * 4] * 2


def test_sequences_of_a_domain_go_to_the_process_that_has_its_expert():
    """Two groups of two processes: shares of the domains 0-1 and 2-3."""
    domain = np.array([3, 0, 2, 1, 1, 3, 0, 2])
    order = order_by_expert(domain, 2, 2)
    assert sorted(order) == list(range(8))
    assert (domain[order].reshape(4, 2) // 2).tolist() == [[0, 0], [1, 1], [0, 0], [1, 1]]
