"""Twenty updates of one model on real processes, whatever engine runs it, compared with a single process."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from training_runs import fork, rank_environments, wait

from btm.config_train import TrainConfig
from btm.corpus.sampler import Batch
from btm.corpus.windows import Windows
from btm.model.causal_lm import load_model
from btm.train.divided_tensor import contribute_all
from btm.train.engine import Engine
from btm.train.ranks import Ranks, joined_ranks
from btm.train.tensor_file import read_tensors, write_tensors

SEQUENCES, LENGTH, VOCABULARY, UPDATES = 5, 10, 61, 20
"""Five sequences: uneven over data-parallel processes; 61 tokens: tensor parallelism pads the vocabulary."""
Reference = Callable[..., dict]


def recipe(clip: float, micro: int | None) -> TrainConfig:
    """A recipe of which some updates are clipped and some are not."""
    shape = {"sequence_length": LENGTH, "batch_tokens": 2 * LENGTH, "micro_batch_sequences": micro}
    return TrainConfig(**shape, lr=1e-2, clip_norm=clip, eps=1e-3)


def run_layout(
    directory: Path,
    world: int,
    make_engine: Callable[[Ranks], Engine],
    *,
    batch_of: Callable[[int], Batch],
    updates: int = UPDATES,
    look: Callable[[Engine], torch.Tensor] | None = None,
) -> dict:
    """Updates on ``world`` processes; what the main one saw, all others having seen the same.

    Args:
        directory: A new one.
        world: Number of processes.
        make_engine: Called in each process.
        batch_of: Batch by number of the update.
        updates: How many; the fourth is skipped.
        look: What to take from the engine before training.
    """
    directory.mkdir()
    (directory / "tokenizer").mkdir()
    (directory / "tokenizer" / "tokenizer.json").write_text("{}")

    def work(rank: int) -> None:
        with joined_ranks() as ranks:
            found = _updates(make_engine(ranks), directory, batch_of, updates, look)
            torch.save(found, directory / f"{rank}.pt")

    pids = [
        fork(lambda rank=rank: work(rank), log=directory / "log.txt", env=env)
        for rank, env in enumerate(rank_environments(world, directory / "rendezvous"))
    ]
    assert [wait(pid) for pid in pids] == [0] * world, (directory / "log.txt").read_text()
    main, *others = [torch.load(directory / f"{rank}.pt") for rank in range(world)]
    for other in others:
        assert other["seen"] == main["seen"]
    load_model(directory / "model")
    model = load_file(directory / "model" / "model.safetensors")
    return main["seen"] | {"tensors": main["tensors"], "look": main["look"], "model": model}


def _updates(
    engine: Engine,
    directory: Path,
    batch_of: Callable[[int], Batch],
    updates: int,
    look: Callable[[Engine], torch.Tensor] | None,
) -> dict:
    history, metrics = [], []
    looked = None if look is None else look(engine)
    for number in range(updates):
        result = engine.gradients(batch_of(number), random_seed=0, stop_requested=False)
        if number == 3:
            continue  # a skipped update leaves nothing behind
        engine.step(1e-2)
        history.append((result.loss, result.norm))
        metrics.append(dict(engine.expert_metrics()))
    dev = engine.dev_loss(windows(), 0)
    counts = {block: list(counts) for block, counts in dev.expert_counts.items()}
    steps = engine.num_optimizer_steps
    seen = {"history": history, "metrics": metrics, "dev": dev.loss, "counts": counts, "steps": steps}
    tensors = _whole_state(engine, directory / "state")
    engine.save_model(directory / "model", directory / "tokenizer")
    return {"seen": seen, "tensors": tensors, "look": looked}


def _whole_state(engine: Engine, path: Path) -> dict[str, dict[str, torch.Tensor]]:
    """Weights and optimizer state on the main process, by way of a file as checkpoints are written."""
    files = engine.tensor_files()
    if not engine.ranks.is_main:
        contribute_all(files.values())
        return {}
    state = {}
    for name, tensors in files.items():
        write_tensors(path, tensors)
        state[name] = {key: torch.empty(tuple(tensor.shape)) for key, tensor in tensors.items()}
        read_tensors(path, state[name])
    return state


def batch(number: int, segments: bool = False) -> Batch:
    """Random tokens, with ``segments`` in packed documents with padding behind them."""
    tokens = np.random.default_rng(number % 4).integers(1, VOCABULARY, size=(SEQUENCES, LENGTH + 1))
    if not segments:
        return Batch(tokens, None, {"d": SEQUENCES * LENGTH})
    numbers = np.tile(np.repeat([1, 2, 0], [4, 5, 2]).astype(np.int32), (SEQUENCES, 1))
    return Batch(tokens, numbers, {"d": SEQUENCES * 7})


def windows() -> Windows:
    """Three windows: one data-parallel process of two has nothing left in its second pass."""
    generator = np.random.default_rng(9)
    inputs, targets = generator.integers(1, VOCABULARY, size=(2, 3, LENGTH))
    targets[1, 4:] = -100
    none = np.zeros(0, dtype=np.int64)
    return Windows(inputs, targets, none, none, none, none, none)


def remembering(factory: pytest.TempPathFactory, run: Callable[..., dict]) -> Reference:
    """``run(directory, 1, **changes)``, once for all equal changes."""
    known: dict[tuple, dict] = {}

    def reference(**changes: Any) -> dict:
        key = tuple(sorted(changes.items()))
        if key not in known:
            known[key] = run(factory.mktemp("reference") / "run", 1, **changes)
        return known[key]

    return reference


def check(ours: dict, right: dict, *, curve: float, norm: float, weights: float, moments: float) -> None:
    """Compare two layouts.

    Args:
        ours: Of the layout.
        right: Of one process.
        curve: Relative, of losses.
        norm: Relative, of gradient norms.
        weights: Share of the norm of all master weights.
        moments: Share of the norm of all moments.
    """
    assert ours["steps"] == right["steps"] == len(right["history"])
    (losses, norms), (right_losses, right_norms) = np.transpose(ours["history"]), np.transpose(right["history"])
    np.testing.assert_allclose(losses, right_losses, rtol=curve)
    np.testing.assert_allclose(norms, right_norms, rtol=norm)
    assert ours["dev"] == pytest.approx(right["dev"], rel=curve)
    for file, bound in (("model.safetensors", weights), ("optimizer.safetensors", moments)):
        assert ours["tensors"][file].keys() == right["tensors"][file].keys()
        flat, right_flat = (_flattened(one["tensors"][file], right["tensors"][file]) for one in (ours, right))
        assert (flat - right_flat).norm() <= bound * right_flat.norm()
    for name, steps in right["tensors"]["optimizer.safetensors"].items():
        assert not _counts_steps(name) or torch.equal(ours["tensors"]["optimizer.safetensors"][name], steps)
    assert ours["model"].keys() == right["model"].keys()
    for name, value in right["model"].items():
        assert ours["model"][name].dtype == value.dtype
        assert (ours["model"][name] - value).norm() <= 5 * weights * value.norm()


def assert_clips_some(right: dict, clip: float) -> None:
    """Some updates of a layout are clipped, some are not."""
    norms = np.transpose(right["history"])[1]
    assert norms.min() < clip < norms.max()


def _flattened(tensors: Mapping[str, torch.Tensor], order: Mapping[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([tensors[name].flatten() for name in order if not _counts_steps(name)])


def _counts_steps(name: str) -> bool:
    """Whether a tensor of a checkpoint counts the optimizer steps of experts."""
    return name.startswith("step.")
