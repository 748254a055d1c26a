import math

import pytest

from btm.errors import TrainingError
from btm.train.spikes import SpikeState, after_good, after_skip, problem_of


def history(*losses: float) -> SpikeState:
    state = SpikeState()
    for loss in losses:
        state = after_good(state, loss)
    return state


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_no_number_is_a_problem_from_the_first_update_on(loss):
    assert "loss" in (problem_of(loss, 1.0, SpikeState(), 3.0) or "")


@pytest.mark.parametrize("norm", [math.nan, math.inf])
def test_a_gradient_that_is_no_number_is_a_problem(norm):
    assert "gradient norm" in (problem_of(1.0, norm, SpikeState(), 3.0) or "")


def test_a_spike_is_judged_against_the_running_mean_of_enough_updates():
    assert problem_of(100.0, 1.0, history(*[2.0] * 9), 3.0) is None
    assert "3 times its running mean 2" in (problem_of(6.1, 1.0, history(*[2.0] * 10), 3.0) or "")
    assert problem_of(5.9, 1.0, history(*[2.0] * 10), 3.0) is None


def test_the_mean_follows_the_losses():
    assert history(1.0, 3.0).mean_loss == pytest.approx(2.0)
    assert history(*[4.0] * 50, *[1.0] * 2000).mean_loss == pytest.approx(1.0, abs=1e-6)


def test_skips_are_counted_and_a_good_update_ends_the_series():
    state = after_skip(after_skip(history(2.0), 2, "bad", 2), 3, "bad", 2)
    assert (state.num_skipped, state.num_consecutive) == (2, 2)
    state = after_good(state, 2.0)
    assert (state.num_skipped, state.num_consecutive, state.num_good) == (2, 0, 2)


def test_too_many_in_a_row_stop_the_training_and_say_what_to_do():
    state = after_skip(SpikeState(), 7, "the loss is nan", 1)
    with pytest.raises(TrainingError, match=r"update 8: the loss is nan.*max_bad_steps=1.*lower train.lr"):
        after_skip(state, 8, "the loss is nan", 1)
    with pytest.raises(TrainingError):
        after_skip(SpikeState(), 1, "the loss is nan", 0)
