"""What an optimizer step moves in flat tensors: the weights that every token uses, and the experts that tokens reached.

An expert that momentum or decay moved without a token would lose what it knows (DEMix,
https://arxiv.org/abs/2108.05036): so each expert has its own number of steps, which the bias correction goes by.
Neighbours in memory that have taken equally many steps are updated in one go; where no expert was ever idle, that is
everything.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.optim.adamw import adamw

from btm.config_train import TrainConfig
from btm.train.flat import SHARED


@dataclass(frozen=True, slots=True)
class Stretches:
    """Parts of a flat tensor, in the order of their places, int64 arrays of equal length."""

    begin: np.ndarray
    end: np.ndarray
    owner: np.ndarray
    """Number of the expert that alone uses it, or :data:`btm.train.flat.SHARED`."""

    @staticmethod
    def of(parts: Iterable[tuple[int, int, int]]) -> "Stretches":
        """From begin, end and owner of each part."""
        begin, end, owner = np.array(sorted(parts), dtype=np.int64).reshape(-1, 3).T
        return Stretches(begin, end, owner)


class StepCounts:
    """How many steps the shared weights and each expert have taken.

    Attributes:
        shared: Steps of the weights that every token uses.
        experts: Steps of each expert of the model, fp32 ``(experts,)`` on the CPU.
    """

    def __init__(self, num_experts: int) -> None:
        self.shared = 0
        self.experts = torch.zeros(num_experts, dtype=torch.float32)

    def count(self, is_busy: np.ndarray) -> None:
        """After a step that moved the busy experts, bool ``(experts,)``."""
        self.shared += 1
        self.experts += torch.from_numpy(is_busy)

    def runs(self, stretches: Stretches, is_busy: np.ndarray) -> Iterator[tuple[int, int, int]]:
        """Begin, end and earlier steps of each run of stretches that the next step updates in one go."""
        begin, end, owner = stretches.begin, stretches.end, stretches.owner
        # A last entry, so that the owners of shared weights find something.
        steps = np.append(self.experts.numpy(), self.shared)[owner].astype(np.int64)
        index = np.flatnonzero((owner == SHARED) | np.append(is_busy, True)[owner])
        if not len(index):
            return
        is_head = np.ones(len(index), dtype=bool)
        is_head[1:] = (steps[index[1:]] != steps[index[:-1]]) | (begin[index[1:]] != end[index[:-1]])
        heads = np.flatnonzero(is_head)
        tails = np.append(heads[1:], len(index)) - 1
        for head, tail in zip(index[heads], index[tails], strict=True):
            yield int(begin[head]), int(end[tail]), int(steps[head])


@torch.no_grad()
def adamw_step(
    parts: Sequence[tuple[Sequence[torch.Tensor], int]],
    train: TrainConfig,
    *,
    learning_rate: float,
    gradient_scale: float,
    is_decayed: bool,
) -> None:
    """One step of fp32 AdamW (https://arxiv.org/abs/1711.05101) in one call.

    Args:
        parts: Weights, gradients, means and mean squares of earlier gradients; and number of earlier steps.
        train: Recipe.
        learning_rate: Of this step.
        gradient_scale: Gradients are divided by it first.
        is_decayed: Whether the weights have weight decay.
    """
    if not parts:
        return
    weights, gradients, means, squares = (
        list(column) for column in zip(*(tensors for tensors, _ in parts), strict=True)
    )
    steps = torch.tensor([float(steps) for _, steps in parts], device=weights[0].device)
    adamw(
        weights,
        gradients,
        means,
        squares,
        [],
        list(steps.unbind()),
        fused=True,
        grad_scale=torch.tensor(gradient_scale, device=steps.device),
        amsgrad=False,
        beta1=train.beta1,
        beta2=train.beta2,
        lr=learning_rate,
        weight_decay=train.weight_decay if is_decayed else 0.0,
        eps=train.eps,
        maximize=False,
    )
