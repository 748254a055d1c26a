"""R6: several processes over gloo compute what one process computes, whatever the micro-batches."""

import json
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from training_runs import (
    die_behind_checkpoint,
    fork,
    only,
    outcome,
    rank_environments,
    run,
    run_group,
    step_dir,
    wait,
)

from btm.config_model import EngineConfig, ModelConfig
from btm.config_train import TrainConfig
from btm.corpus.sampler import Batch
from btm.model.causal_lm import build_model
from btm.train.ranks import joined_ranks
from btm.train.torch_engine import TorchEngine

pytestmark = pytest.mark.distributed
SEQUENCES = 6


def steps_on(directory: Path, world: int, micro: int | None, segments: bool) -> None:
    """Three updates on each rank; leaves what each saw."""

    def work(rank: int) -> None:
        with joined_ranks() as ranks:
            model = build_model(ModelConfig(num_layers=1, hidden_size=32, num_heads=2), vocab_size=61, eos_id=0, seed=1)
            train = TrainConfig(sequence_length=10, lr=1e-2, micro_batch_sequences=micro, clip_norm=0.5, eps=1e-3)
            engine = TorchEngine(model, train=train, config=EngineConfig(dtype="fp32"), ranks=ranks)
            history, gradients = [], []
            for number in range(3):
                result = engine.gradients(_batch(number, segments), random_seed=0, stop_requested=False)
                gradients.append(engine.flat.gradients.clone())
                engine.step(1e-2)
                history.append((result.loss, result.norm))
            torch.save([history, gradients, engine.flat.masters.clone()], directory / f"{world}-{rank}.pt")

    rendezvous = directory / f"rendezvous-{world}"
    pids = [
        fork(lambda rank=rank: work(rank), log=directory / "log.txt", env=env)
        for rank, env in enumerate(rank_environments(world, rendezvous))
    ]
    assert [wait(pid) for pid in pids] == [0] * world, (directory / "log.txt").read_text()


def _batch(number: int, segments: bool) -> Batch:
    tokens = np.random.default_rng(number).integers(1, 61, size=(SEQUENCES, 11))
    if not segments:
        return Batch(tokens, None, {"d": SEQUENCES * 10})
    numbers = np.zeros((SEQUENCES, 11), dtype=np.int32)
    for row in range(SEQUENCES):
        numbers[row, : row + 2], numbers[row, row + 2 : row + 5] = 1, 2
    return Batch(tokens, numbers, {"d": sum(row + 1 + 2 for row in range(SEQUENCES))})


@pytest.mark.parametrize("segments", [False, True])
@pytest.mark.parametrize("micro", [None, 1])
def test_loss_gradients_norm_and_weights_do_not_depend_on_the_number_of_processes(tmp_path, micro, segments):
    worlds = (1, 2, 4)
    for world in worlds:
        steps_on(tmp_path, world, micro, segments)
    history, gradients, masters = torch.load(tmp_path / "1-0.pt")
    for world in worlds[1:]:
        per_rank = [torch.load(tmp_path / f"{world}-{rank}.pt") for rank in range(world)]
        for other in per_rank[1:]:
            assert other[0] == per_rank[0][0]
            assert torch.equal(other[2], per_rank[0][2])
        np.testing.assert_allclose(per_rank[0][0], history, rtol=1e-6)
        # The second update already starts from weights that differ a little.
        for ours, reference, bound in zip(per_rank[0][1], gradients, (1e-6, 1e-5, 1e-5), strict=True):
            assert (ours - reference).norm() <= bound * reference.norm()
        torch.testing.assert_close(per_rank[0][2], masters, rtol=0, atol=1e-6)


def test_a_whole_run_on_two_processes_gives_the_rows_of_one(make_spec):
    one, two = make_spec("one"), make_spec("two", num_processes=2)
    assert run(one) == 0
    assert run_group(two, 2) == [0, 0]
    for ours, reference in zip(outcome(two)["rows"], outcome(one)["rows"], strict=True):
        assert ours.keys() == reference.keys()
        assert list(ours.values()) == pytest.approx(list(reference.values()), rel=1e-4)
    assert outcome(two)["result"]["realised_tokens"] == outcome(one)["result"]["realised_tokens"]


def test_more_processes_than_sequences_end_all_the_same(make_spec):
    spec = make_spec(batch_sequences=1, last_update=4, num_processes=2)
    assert run_group(spec, 2) == [0, 0]
    assert json.loads((step_dir(spec, 4) / "state.json").read_text())["progress"]["tokens"] == 4 * 16


def test_a_process_that_never_comes_back_is_told_apart_from_an_error_of_the_user(make_spec):
    spec = make_spec(num_processes=2)
    codes = run_group(spec, 2, before=only(1, lambda: die_behind_checkpoint(spec)))
    assert codes == [75, -signal.SIGKILL]
