"""AdamW over flat buffers, which leaves out the experts that no token of an update reached."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch

from btm.config_train import TrainConfig
from btm.train.expert_steps import StepCounts, Stretches, adamw_step
from btm.train.flat import Span


class FlatWeights(Protocol):
    """What can be stepped on: :class:`btm.train.flat.FlatParameters`, or a stretch of such buffers."""

    @property
    def masters(self) -> torch.Tensor:
        """fp32 ``(size,)``."""
        ...

    @property
    def gradients(self) -> torch.Tensor:
        """Like ``masters``."""
        ...

    @property
    def spans(self) -> Sequence[Span]:
        """Division of both by weight decay and owner."""
        ...


class FlatAdamW:
    """fp32 AdamW (https://arxiv.org/abs/1711.05101); of an idle expert neither weights nor moments nor steps change.

    Attributes:
        moments: Mean and mean square of the gradients, fp32 ``(size,)`` each.
        steps: Steps of the shared weights and of each expert.
    """

    def __init__(self, flat: FlatWeights, train: TrainConfig, num_owners: int) -> None:
        """Begin with moments of zero.

        Args:
            flat: What to update.
            train: Recipe.
            num_owners: Experts of the whole model, those of other processes included.
        """
        self.moments = tuple(torch.zeros_like(flat.masters) for _ in range(2))
        self.steps = StepCounts(num_owners)
        self._flat, self._train = flat, train
        spans = [span for span in flat.spans if not span.is_frozen]
        self._stretches = {
            wanted: Stretches.of((span.begin, span.end, span.owner) for span in spans if span.is_decayed is wanted)
            for wanted in (True, False)
        }

    def step(self, learning_rate: float, gradient_scale: float, is_busy: np.ndarray) -> None:
        """Update all weights and the busy experts.

        Args:
            learning_rate: Of this step.
            gradient_scale: Gradients are divided by it first.
            is_busy: For each expert whether a token of the update reached it, bool ``(number of owners,)``.
        """
        buffers = (self._flat.masters, self._flat.gradients, *self.moments)
        for is_decayed, stretches in self._stretches.items():
            runs = self.steps.runs(stretches, is_busy)
            parts = [([buffer[begin:end] for buffer in buffers], steps) for begin, end, steps in runs]
            adamw_step(
                parts, self._train, learning_rate=learning_rate, gradient_scale=gradient_scale, is_decayed=is_decayed
            )
        self.steps.count(is_busy)
