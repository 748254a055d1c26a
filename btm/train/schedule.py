"""Learning rates as pure functions of the update, so that a branch continues its parent's schedule by its number."""

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType

from btm.config_train import Schedule, TrainConfig


def _cosine(done: float, train: TrainConfig) -> float:
    return 0.5 * (1.0 + math.cos(math.pi * done))


def _linear(done: float, train: TrainConfig) -> float:
    return 1.0 - done


def _wsd(done: float, train: TrainConfig) -> float:
    # ``done`` counts from the end of the warm-up; the decay takes a share of all updates.
    share = min(1.0, train.decay_fraction / max(1e-12, 1.0 - train.warmup_fraction))
    return min(1.0, (1.0 - done) / share)


def _constant(done: float, train: TrainConfig) -> float:
    return 1.0


DECAYS: Mapping[Schedule, Callable[[float, TrainConfig], float]] = MappingProxyType(
    {Schedule.cosine: _cosine, Schedule.linear: _linear, Schedule.wsd: _wsd, Schedule.constant: _constant}
)
"""Height above the last learning rate, 1 to 0, as a function of the share of the updates after the warm-up."""


def learning_rate(update: int, total_updates: int, train: TrainConfig) -> float:
    """Learning rate of one update.

    It rises linearly to ``train.lr`` over the first ``warmup_fraction`` of all updates, then falls to
    ``min_lr_fraction`` of it: along half a cosine (https://arxiv.org/abs/1608.03983), linearly, or after a plateau
    (wsd, https://arxiv.org/abs/2404.06395); ``constant`` stays.

    Args:
        update: Number of the update, from 1 to ``total_updates``; a branched ELM goes on counting.
        total_updates: Updates of the whole schedule, seed phase included.
        train: Recipe.
    """
    warmup = round(train.warmup_fraction * total_updates)
    if update <= warmup:
        return train.lr * update / warmup
    done = min(1.0, (update - warmup) / max(1, total_updates - warmup))
    height = DECAYS[train.schedule](done, train)
    return train.lr * (train.min_lr_fraction + (1.0 - train.min_lr_fraction) * height)
