import math

import pytest

from btm.config_train import TrainConfig
from btm.train.schedule import learning_rate


def recipe(**changes) -> TrainConfig:
    return TrainConfig(**({"lr": 1.0, "warmup_fraction": 0.1, "min_lr_fraction": 0.1} | changes))


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd", "constant"])
def test_warm_up_rises_linearly_to_the_peak(schedule):
    train = recipe(schedule=schedule)
    assert [learning_rate(update, 100, train) for update in (1, 5, 10)] == pytest.approx([0.1, 0.5, 1.0])


@pytest.mark.parametrize(
    ("schedule", "values"),
    [
        ("cosine", {55: 0.55, 100: 0.1, 32.5: 0.1 + 0.45 * (1 + math.cos(math.pi / 4))}),
        ("linear", {55: 0.55, 100: 0.1, 28: 0.82}),
        ("wsd", {11: 1.0, 80: 1.0, 90: 0.55, 100: 0.1}),
        ("constant", {11: 1.0, 100: 1.0}),
    ],
)
def test_values_after_the_warm_up(schedule, values):
    train = recipe(schedule=schedule)
    for update, expected in values.items():
        assert learning_rate(update, 100, train) == pytest.approx(expected)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd"])
def test_the_last_update_has_the_smallest_rate_and_no_update_a_negative_one(schedule):
    train = recipe(schedule=schedule, min_lr_fraction=0.0)
    values = [learning_rate(update, 37, train) for update in range(1, 38)]
    assert min(values) == values[-1] == pytest.approx(0.0, abs=1e-12)
    assert max(values) <= 1.0


def test_no_warm_up_and_nothing_but_warm_up():
    assert learning_rate(1, 10, recipe(warmup_fraction=0.0, schedule="constant")) == 1.0
    assert learning_rate(10, 10, recipe(warmup_fraction=1.0)) == 1.0
    assert learning_rate(1, 1, recipe()) == pytest.approx(0.1)
