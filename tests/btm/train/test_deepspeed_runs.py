"""Whole DeepSpeed runs: killed and continued, also by other stages, numbers of processes and engines."""

import random
import time

import deepspeed_ready  # noqa: F401
import pytest
from engine_runs import KILLED, PEER_LOST, by_deepspeed, by_torch, dying_after, same_curve
from training_runs import kill, last_checkpoint, log, outcome, run, run_group, start_group, wait, wait_for

pytestmark = pytest.mark.distributed


def test_a_run_goes_on_with_other_stages_numbers_of_processes_and_engines(make_spec):
    reference, spec = make_spec("reference"), make_spec()
    assert run(reference) == 0
    attempts = [(by_deepspeed(spec, 2, 2), 5), (by_deepspeed(spec, 3, 1), 10), (by_torch(spec, 2), 15)]
    for number, (attempt, update) in enumerate(attempts):
        world = attempt.engine.num_processes
        codes = [wait(pid) for pid in start_group(attempt, world, before=dying_after(update), attempt=number)]
        assert codes == [KILLED, PEER_LOST][:world], log(spec)
        assert last_checkpoint(spec) == update
    assert run_group(by_deepspeed(spec, 3, 2), 2, attempt=9) == [0, 0], log(spec)
    same_curve(spec, reference)


@pytest.mark.parametrize("stage", [*(pytest.param(stage, marks=pytest.mark.slow) for stage in range(3)), 3])
def test_a_killed_run_ends_with_the_bits_of_the_run_that_was_not(make_spec, stage):
    dtype = {"dtype": "bf16"} if stage in (1, 3) else {}
    reference, spec = (by_deepspeed(make_spec(name), stage, 2, **dtype) for name in ("reference", "seed"))
    assert run_group(reference, 2) == [0, 0], log(reference)
    codes = [wait(pid) for pid in start_group(spec, 2, before=dying_after(10))]
    assert codes == [KILLED, PEER_LOST], log(spec)
    assert run_group(spec, 2, attempt=1) == [0, 0], log(spec)
    assert outcome(spec) == outcome(reference)


@pytest.mark.slow
@pytest.mark.parametrize("stage", range(4))
def test_kills_of_either_rank_at_random_moments_change_nothing(make_spec, stage):
    changes = {"last_update": 120, "total_updates": 120, "checkpoint_every": 3}
    reference, spec = (by_deepspeed(make_spec(name, **changes), stage, 2) for name in ("reference", "seed"))
    assert run_group(reference, 2) == [0, 0], log(reference)
    generator = random.Random(stage)
    for attempt, victim in enumerate((1, 0, 1, 0)):
        before = last_checkpoint(spec)
        pids = start_group(spec, 2, attempt=attempt)
        wait_for(lambda before=before: last_checkpoint(spec) > before)
        time.sleep(generator.uniform(0.0, 0.05))
        assert kill(pids[victim]) == KILLED
        assert wait(pids[1 - victim]) == PEER_LOST, log(spec)
    assert run_group(spec, 2, attempt=9) == [0, 0], log(spec)
    assert outcome(spec) == outcome(reference)


@pytest.mark.slow
def test_a_branch_continues_the_seeds_optimizer_under_another_engine(make_spec):
    """Half of a forest by one engine, half by another: an ELM of DeepSpeed branches from a seed of the torch engine."""
    from btm.requests import Start

    seed = make_spec("seed")
    assert run(seed) == 0
    branch = {"start": Start(kind="checkpoint", path=seed.output_dir), "first_update": 20, "last_update": 40}
    reference, spec = (make_spec(name, domains=("ants",), **branch) for name in ("by-torch", "by-deepspeed"))
    assert run(reference) == 0, log(reference)
    spec = by_deepspeed(spec, 3, 2)
    assert run_group(spec, 2) == [0, 0], log(spec)
    same_curve(spec, reference)
