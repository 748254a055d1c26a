"""B2, R1, R2, R3, R7, R18: a run that was ended at any moment and started again is the run that was not, bit by bit."""

import json
import os
import random
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from training_runs import (
    die_behind_checkpoint,
    kill,
    last_checkpoint,
    log,
    only,
    outcome,
    rows,
    run,
    run_group,
    start,
    step_dir,
)

from btm.records import TrainResult
from btm.requests import TrainSpec
from tests.btm.chosen_moments import at_call, die_at_change

CALLS_PER_UPDATE = 10_000  # of functions, roughly
LONG = {"last_update": 150, "total_updates": 150, "checkpoint_every": 4}


@pytest.fixture
def uninterrupted(make_spec) -> Callable[..., TrainSpec]:
    """A finished run with the same request under another name."""

    def make(**changes) -> TrainSpec:
        spec = make_spec("uninterrupted", **changes)
        assert run(spec) == 0, log(spec)
        return spec

    return make


@pytest.mark.distributed
def test_b2_kills_at_random_moments_change_nothing(make_spec, uninterrupted):
    reference, spec = uninterrupted(**LONG), make_spec(**LONG)
    generator = random.Random(0)
    for _ in range(6):
        # Behind the first checkpoint of this attempt, so that the run gets on; up to five updates later.
        moment = generator.randrange(5 * CALLS_PER_UPDATE)
        assert run(spec, before=lambda moment=moment: die_behind_checkpoint(spec, moment)) == -signal.SIGKILL
    assert run(spec) == 0, log(spec)
    assert outcome(spec) == outcome(reference)


@pytest.mark.distributed
def test_b2_kills_inside_every_write_change_nothing(make_spec, uninterrupted):
    """The n-th fsync or rename of an attempt is its last act, for every n until one attempt reaches the end."""
    reference, spec = uninterrupted(), make_spec()
    kills = 0
    for number in range(1, 200):
        code = run(spec, before=lambda number=number: die_at_call(number))
        if code == 0:
            break
        assert code == -signal.SIGKILL, log(spec)
        kills += 1
    assert kills >= 15
    assert outcome(spec) == outcome(reference)
    assert not list(Path(spec.output_dir).rglob(".tmp-*"))


def die_at_call(number: int) -> None:
    """Let the process kill itself just before its ``number``-th call that makes something durable."""
    calls = iter(range(1, number))

    def wrapped(original: Callable) -> Callable:
        def call(*arguments, **keywords):
            if next(calls, None) is None:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*arguments, **keywords)

        return call

    os.fsync, os.rename, os.replace = wrapped(os.fsync), wrapped(os.rename), wrapped(os.replace)


@pytest.mark.distributed
def test_b2_kills_of_single_ranks_change_nothing(make_spec, uninterrupted):
    changes = {"num_processes": 2, "last_update": 60, "total_updates": 60}
    reference, spec = make_spec("uninterrupted", **changes), make_spec(**changes)
    assert run_group(reference, 2) == [0, 0]
    for attempt, victim in enumerate((1, 0, 1)):
        codes = run_group(spec, 2, before=only(victim, lambda: die_behind_checkpoint(spec)), attempt=attempt)
        assert (codes[victim], codes[1 - victim]) == (-signal.SIGKILL, 75)
    assert run_group(spec, 2, attempt=9) == [0, 0], log(spec)
    assert outcome(spec) == outcome(reference)


def signal_itself(spec: TrainSpec, number: signal.Signals) -> None:
    """Let this process get a signal in the midst of its training, some updates after its third row of metrics."""
    path = Path(spec.output_dir) / "metrics.jsonl"
    at_call(2 * CALLS_PER_UPDATE, lambda: path.exists() and len(rows(spec)) >= 3, lambda: os.kill(os.getpid(), number))


@pytest.mark.distributed
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2])
def test_a_stop_on_request_saves_the_update_and_loses_nothing(make_spec, uninterrupted, number):
    changes = {**LONG, "checkpoint_every": 1000}
    reference, spec = uninterrupted(**changes), make_spec(**changes)
    assert run(spec, before=lambda: signal_itself(spec, number)) == 143
    stopped_at = last_checkpoint(spec)
    assert 0 < stopped_at < spec.last_update
    assert not (Path(spec.output_dir) / "result.json").exists()
    seconds = json.loads((step_dir(spec, stopped_at) / "state.json").read_text())["progress"]["seconds"]
    assert run(spec) == 0, log(spec)
    assert f"step-{stopped_at:08d}" in log(spec)
    assert outcome(spec) == outcome(reference)
    assert TrainResult.load(Path(spec.output_dir) / "result.json").ledger.seconds > seconds


@pytest.mark.distributed
def test_a_stop_of_one_rank_stops_all_ranks_at_the_same_update(make_spec):
    changes = {**LONG, "checkpoint_every": 1000, "num_processes": 2}
    reference, spec = make_spec("uninterrupted", **changes), make_spec(**changes)
    assert run_group(reference, 2) == [0, 0]
    assert run_group(spec, 2, before=only(1, lambda: signal_itself(spec, signal.SIGTERM))) == [143, 143]
    assert 0 < last_checkpoint(spec) < spec.last_update
    assert run_group(spec, 2, attempt=1) == [0, 0], log(spec)
    assert outcome(spec) == outcome(reference)


@pytest.mark.distributed
def test_a_damaged_checkpoint_is_named_set_aside_and_made_again(make_spec, uninterrupted):
    reference, spec = uninterrupted(), make_spec()
    assert run(spec) == 0, log(spec)
    (Path(spec.output_dir) / "result.json").unlink()
    path = step_dir(spec, 20) / "optimizer.safetensors"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 16
    path.write_bytes(data)
    assert run(spec) == 0, log(spec)
    assert f"{step_dir(spec, 20)} is damaged: exp_avg" in log(spec)
    assert outcome(spec) == outcome(reference)


def test_a_finished_run_ends_at_once_and_is_not_touched(make_spec):
    spec = make_spec()
    assert run(spec) == 0
    said = log(spec)
    before = {path: path.stat().st_mtime_ns for path in Path(spec.output_dir).rglob("*.safetensors")}
    # It would be killed if it so much as took the lock of the directory.
    assert run(spec, before=lambda: die_at_change(1)) == 0
    assert log(spec) == said
    assert {path: path.stat().st_mtime_ns for path in Path(spec.output_dir).rglob("*.safetensors")} == before


def test_r18_a_checkpoint_of_another_training_is_refused_with_the_differences(make_spec):
    spec = make_spec()
    assert run(spec) == 0
    (Path(spec.output_dir) / "result.json").unlink()
    other = make_spec(domains=("ants",), lr=5e-3, seed=8)
    assert run(other) == 1
    last_line = log(other).splitlines()[-1]
    for part in ("train.lr: 0.01 before, 0.005 now", "seed: 7 before, 8 now", "sources.1.domain: 'bees' before"):
        assert part in last_line
    assert last_checkpoint(spec) == 20


def test_r18_the_result_of_another_training_is_refused(make_spec):
    assert run(make_spec(last_update=4)) == 0
    other = make_spec(last_update=4, seed=8)
    assert run(other) == 1
    assert "result of another request" in log(other).splitlines()[-1]


def test_r18_another_tokenizer_is_refused(make_spec, corpus, tmp_path):
    spec = make_spec()
    assert run(spec) == 0
    (Path(spec.output_dir) / "result.json").unlink()
    tokenizer = tmp_path / "tokenizer"
    shutil.copytree(corpus / "tokenizer", tokenizer)
    content = json.loads((tokenizer / "tokenizer.json").read_text())
    content["model"]["merges"].pop()
    (tokenizer / "tokenizer.json").write_text(json.dumps(content))
    assert run(spec.model_copy(update={"tokenizer_dir": str(tokenizer)})) == 1
    assert "tokenizer: " in log(spec).splitlines()[-1]


def test_settings_that_do_not_change_what_is_learnt_may_change(make_spec):
    spec = make_spec(last_update=10, total_updates=20)
    assert run(spec) == 0
    (Path(spec.output_dir) / "result.json").unlink()
    assert run(make_spec(last_update=10, total_updates=20, checkpoint_every=3, max_bad_steps=4)) == 0, log(spec)


def test_two_trainings_of_one_directory_are_refused(make_spec):
    spec = make_spec()
    pid = start(spec, before=lambda: at_call(0, lambda: last_checkpoint(spec) >= 5, pause))
    assert os.WIFSTOPPED(os.waitpid(pid, os.WUNTRACED)[1])
    assert run(spec) == 1
    assert "another process holds" in log(spec)
    assert kill(pid) == -signal.SIGKILL
    assert run(spec) == 0


def pause() -> None:
    """Stop this process until somebody lets it go on."""
    os.kill(os.getpid(), signal.SIGSTOP)
