"""R1, R3, R4, R10: what a request leaves behind, branches, bad updates, full disks, errors of the user."""

import errno
import json
import os
import resource
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from training_runs import last_checkpoint, log, outcome, rows, run, run_group, step_dir

from btm.model.causal_lm import load_model
from btm.records import TrainResult
from btm.requests import Start, TrainSpec
from btm.train.torch_engine import TorchEngine


def result_of(spec: TrainSpec) -> TrainResult:
    return TrainResult.load(Path(spec.output_dir) / "result.json")


def seed_then_rest(make_spec, **changes) -> tuple[TrainSpec, TrainSpec, TrainSpec]:
    """A seed phase of 10 updates, its continuation, and the same 20 updates in one run."""
    changes = {"total_updates": 20, "micro_batch_sequences": 4, **changes}
    seed = make_spec("seed", last_update=10, **changes)
    start = Start(kind="checkpoint", path=seed.output_dir)
    rest = make_spec("rest", start=start, first_update=10, last_update=20, **changes)
    return seed, rest, make_spec("whole", last_update=20, **changes)


def test_a_run_leaves_what_it_promises(make_spec):
    spec = make_spec(dtype="bf16")
    assert run(spec) == 0, log(spec)
    result = result_of(spec)
    assert result.spec_sha256 == spec.sha256
    assert (result.updates, result.ledger.tokens, result.skipped_updates) == (20, 20 * 8 * 16, 0)
    assert sum(result.realised_tokens.values()) == 20 * 8 * 16
    assert set(result.dev_loss) == {"ants", "bees"}
    model = load_model(result.model_dir, torch.bfloat16)
    assert model.num_parameters() == result.num_parameters
    training = [row for row in rows(spec) if "train/loss" in row]
    assert [row["update"] for row in training] == list(range(2, 21, 2))
    assert training[-1]["train/loss"] < training[0]["train/loss"]
    assert [row["update"] for row in rows(spec) if "eval/ants/loss" in row] == [10, 20]
    assert all(key in training[0] for key in ("tokens", "train/lr", "train/grad_norm", "train/skipped"))


def test_the_last_evaluation_is_that_of_the_saved_model(make_spec):
    spec = make_spec()
    assert run(spec) == 0
    assert {f"eval/{domain}/loss": loss for domain, loss in result_of(spec).dev_loss.items()}.items() <= rows(spec)[
        -1
    ].items()


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_branch_with_its_parents_data_is_the_parent_going_on(make_spec, dtype):
    """Optimizer moments, step count, schedule and data order continue: bit for bit the run without a branch."""
    seed, rest, whole = seed_then_rest(make_spec, dtype=dtype)
    for spec in (seed, rest, whole):
        assert run(spec) == 0, log(spec)
    assert outcome(rest)["files"] == outcome(whole)["files"]
    states = [json.loads((step_dir(spec, 20) / "state.json").read_text())["progress"] for spec in (rest, whole)]
    assert states[0]["num_optimizer_steps"] == states[1]["num_optimizer_steps"] == 20


def test_a_branch_counts_its_own_tokens_and_leaves_its_parent_alone(make_spec):
    seed, rest, _ = seed_then_rest(make_spec)
    assert run(seed) == 0
    before = {path: path.read_bytes() for path in Path(seed.output_dir).rglob("*") if path.is_file()}
    assert run(rest) == 0
    assert {path: path.read_bytes() for path in Path(seed.output_dir).rglob("*") if path.is_file()} == before
    assert (result_of(rest).updates, result_of(rest).ledger.tokens) == (10, 10 * 8 * 16)
    first = next(row for row in rows(rest) if "train/loss" in row)
    assert (first["update"], first["tokens"]) == (12, 2 * 8 * 16)


def test_a_branch_refuses_a_parent_that_is_not_where_it_begins(make_spec):
    seed, rest, _ = seed_then_rest(make_spec, checkpoint_every=4)
    assert run(seed) == 0
    path = step_dir(seed, 10) / "model.safetensors"
    os.truncate(path, 100)
    assert run(rest) == 1
    assert "is damaged: model.safetensors has 100 bytes" in log(rest)
    assert "is of update 8, the branch begins at 10" in log(rest).splitlines()[-1]
    (Path(seed.output_dir) / "result.json").unlink()
    assert run(seed) == 0
    assert run(rest) == 0


def test_weights_of_a_directory_start_with_a_fresh_optimizer(make_spec):
    seed = make_spec("seed")
    assert run(seed) == 0
    model = Path(seed.output_dir) / "model"
    spec = make_spec("tuned", start=Start(kind="weights", path=str(model)), last_update=0, total_updates=5)
    assert run(spec) == 0, log(spec)
    weights = load_file(step_dir(spec, 0) / "model.safetensors")
    wanted = load_file(model / "model.safetensors")
    assert all(torch.equal(weights[name], wanted[name]) for name in weights)
    moments = load_file(step_dir(spec, 0) / "optimizer.safetensors")
    assert all((moment == 0).all() for moment in moments.values())
    assert result_of(spec).final_loss == pytest.approx(sum(result_of(seed).dev_loss.values()) / 2)


def spoil(update: int, value: float, *, rank: int = 0):
    """Multiply the gradients of one update by ``value`` on one rank, and its loss too."""

    def before(own_rank: int = 0) -> None:
        if own_rank != rank:
            return
        original, calls = TorchEngine._backward, iter(range(1, 10_000))

        def backward(self, rows):
            total = original(self, rows)
            if next(calls) != update:
                return total
            self.flat.slots[0].view(self.flat.gradients).mul_(value)
            return total * value

        TorchEngine._backward = backward

    return before


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e4])
def test_r10_a_bad_update_is_skipped_counted_and_logged(make_spec, value):
    spec = make_spec()
    assert run(spec, before=spoil(15, value)) == 0, log(spec)
    assert "update 15 is skipped" in log(spec)
    assert result_of(spec).skipped_updates == 1
    assert json.loads((step_dir(spec, 20) / "state.json").read_text())["progress"]["num_optimizer_steps"] == 19
    assert rows(spec)[-2]["train/skipped"] == 1
    assert all(tensor.isfinite().all() for tensor in load_file(step_dir(spec, 20) / "model.safetensors").values())


@pytest.mark.distributed
@pytest.mark.parametrize("value", [float("nan"), 1e4])
def test_r10_a_bad_update_on_one_rank_is_skipped_on_all(make_spec, value):
    spec = make_spec(num_processes=2)
    assert run_group(spec, 2, before=spoil(15, value, rank=1)) == [0, 0], log(spec)
    assert result_of(spec).skipped_updates == 1
    assert log(spec).count("update 15 is skipped") == 1


def test_r10_too_many_bad_updates_stop_with_one_clear_line_and_can_be_continued(make_spec):
    def before() -> None:
        original = TorchEngine._backward

        def backward(self, rows):
            return original(self, rows) * float("nan")

        TorchEngine._backward = backward

    first = make_spec(last_update=10, total_updates=40)
    assert run(first) == 0
    (Path(first.output_dir) / "result.json").unlink()
    spec = make_spec(max_bad_steps=2, last_update=10, total_updates=40)
    os.rename(step_dir(spec, 10), step_dir(spec, 10).with_name("gone"))
    assert run(spec, before=before) == 1
    assert "update 8: the loss is nan, and train.max_bad_steps=2" in log(spec).splitlines()[-1]
    assert last_checkpoint(spec) == 5
    assert run(make_spec(max_bad_steps=3, last_update=10, total_updates=40)) == 0, log(spec)


def test_a_full_disk_stops_cleanly_and_the_run_goes_on_when_there_is_room(make_spec):
    spec = make_spec()

    def before() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))

    reference = make_spec("reference")
    assert run(reference) == 0
    assert run(make_spec(last_update=20), before=before) == 1
    last_line = log(spec).splitlines()[-1]
    assert "cannot write the checkpoint of update 5" in last_line
    assert "bytes" in last_line
    assert last_checkpoint(spec) == -1
    assert run(spec) == 0
    assert outcome(spec) == outcome(reference)


def test_a_full_disk_at_the_end_is_an_error_of_the_user_too(make_spec):
    spec = make_spec()

    def before() -> None:
        def save_model(self, directory, tokenizer_dir):
            raise OSError(errno.ENOSPC, "No space left on device", str(directory))

        TorchEngine.save_model = save_model

    assert run(spec, before=before) == 1
    assert "No space left on device" in log(spec).splitlines()[-1]
    assert run(spec) == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"start": Start(kind="checkpoint", path="nowhere")}, "no undamaged checkpoint"),
        ({"start": Start(kind="weights", path="nowhere")}, "not a directory"),
        ({"tokenizer_dir": "nowhere"}, "tokenizer"),
    ],
)
def test_errors_of_the_user_are_the_last_line_without_a_traceback(make_spec, changes, message):
    spec = make_spec().model_copy(update=changes)
    assert run(spec) == 1
    assert message in log(spec).splitlines()[-1]
    assert "Traceback" not in log(spec)


def test_documents_packing_trains(make_spec):
    spec = make_spec(packing="documents", last_update=6)
    assert run(spec) == 0, log(spec)
    assert 0 < sum(result_of(spec).realised_tokens.values()) < 6 * 8 * 16
