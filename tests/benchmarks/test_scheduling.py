"""The orchestrator in simulated time: nothing waits without need, nothing is lost but what no checkpoint holds."""

import pytest
from simulated_cluster import Trial, simulate

from btm.forest import Forest


def test_as_many_groups_as_elms_take_as_long_as_the_longest_training(tmp_path):
    account = simulate(Trial(num_elms=6, num_groups=6, spread=0.3), tmp_path)
    assert account.joined == 6
    assert account.failures == 0
    # One look of the driver to see the end, one to let the ELM join, and what the driver itself took.
    assert 0 <= account.makespan_s - account.ideal_s <= 3 + account.driver_s


def test_more_elms_than_groups_leave_no_group_idle(tmp_path):
    trial = Trial(num_elms=8, num_groups=2, spread=0)
    account = simulate(trial, tmp_path)
    rounds = 4
    assert 0 <= account.makespan_s - rounds * trial.mean_s <= rounds * 3 + account.driver_s


@pytest.mark.parametrize("seed", range(3))
def test_failures_cost_no_more_than_a_checkpoint_interval_each(tmp_path, seed):
    trial = Trial(num_elms=5, num_groups=2, between_failures_s=8 * 3600, seed=seed)
    account = simulate(trial, tmp_path)
    assert account.joined == 5
    assert Forest.open(tmp_path).damages() == []
    assert account.failures > 0
    assert 0 < account.lost_s <= account.failures * trial.checkpoint_s
    again_s = account.lost_s + account.failures * (trial.start_s + 2)
    # First in, first out is at most one training longer than the bound (Graham 1966).
    assert account.makespan_s <= account.ideal_s + max(trial.lengths()) + again_s + 6 + account.driver_s
