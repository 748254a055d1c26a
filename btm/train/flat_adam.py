"""AdamW over flat buffers, which leaves out the experts that no token of an update reached."""

from collections.abc import Iterator

import numpy as np
import torch
from torch.optim.adamw import adamw

from btm.config_train import TrainConfig
from btm.train.flat import SHARED, FlatParameters


class FlatAdamW:
    """fp32 AdamW (https://arxiv.org/abs/1711.05101); of an idle expert neither weights nor moments nor steps change.

    An expert that momentum or decay moved without a token would lose what it knows (DEMix,
    https://arxiv.org/abs/2108.05036): so each expert has its own number of steps, which the bias correction goes by.
    Neighbours in memory that have taken equally many steps are updated in one go; where no expert was ever idle, that
    is all matrices and all vectors.

    Attributes:
        moments: Mean and mean square of the gradients, fp32 ``(size,)`` each.
        num_steps: Steps of the weights that every token uses.
        owner_steps: Steps of each expert, fp32 ``(number of owners,)`` on the CPU.
    """

    def __init__(self, flat: FlatParameters, train: TrainConfig, num_owners: int) -> None:
        """Begin with moments of zero.

        Args:
            flat: What to update.
            train: Recipe.
            num_owners: Experts of the whole model, those of other processes included.
        """
        self.moments = tuple(torch.zeros_like(flat.masters) for _ in range(2))
        self.num_steps = 0
        self.owner_steps = torch.zeros(num_owners, dtype=torch.float32)
        self._flat, self._train = flat, train
        spans = [span for span in flat.spans if not span.is_frozen]
        self._begin = np.array([span.begin for span in spans], dtype=np.int64)
        self._end = np.array([span.end for span in spans], dtype=np.int64)
        self._owner = np.array([span.owner for span in spans], dtype=np.int64)
        self._is_decayed = np.array([span.is_decayed for span in spans], dtype=bool)

    @torch.no_grad()
    def step(self, learning_rate: float, gradient_scale: float, is_busy: np.ndarray) -> None:
        """Update all weights and the busy experts.

        Args:
            learning_rate: Of this step.
            gradient_scale: Gradients are divided by it first.
            is_busy: For each expert whether a token of the update reached it, bool ``(number of owners,)``.
        """
        train, flat = self._train, self._flat
        scale = torch.tensor(gradient_scale, device=flat.masters.device)
        for is_decayed in (True, False):
            runs = list(self._runs(is_busy, is_decayed))
            if not runs:
                continue
            parts = [slice(begin, end) for begin, end, _ in runs]
            steps = torch.tensor([float(steps) for _, _, steps in runs], device=flat.masters.device)
            adamw(
                [flat.masters[part] for part in parts],
                [flat.gradients[part] for part in parts],
                [self.moments[0][part] for part in parts],
                [self.moments[1][part] for part in parts],
                [],
                list(steps.unbind()),
                fused=True,
                grad_scale=scale,
                amsgrad=False,
                beta1=train.beta1,
                beta2=train.beta2,
                lr=learning_rate,
                weight_decay=train.weight_decay if is_decayed else 0.0,
                eps=train.eps,
                maximize=False,
            )
        self.num_steps += 1
        self.owner_steps += torch.from_numpy(is_busy)

    def _runs(self, is_busy: np.ndarray, is_decayed: bool) -> Iterator[tuple[int, int, int]]:
        """Begin, end and earlier steps of each stretch that is updated in one go."""
        is_shared = self._owner == SHARED
        # A last entry, so that the owners of shared weights find something.
        steps = np.append(self.owner_steps.numpy(), self.num_steps)[self._owner].astype(np.int64)
        is_taken = (is_shared | np.append(is_busy, True)[self._owner]) & (self._is_decayed == is_decayed)
        index = np.flatnonzero(is_taken)
        if not len(index):
            return
        is_head = np.ones(len(index), dtype=bool)
        is_head[1:] = (steps[index[1:]] != steps[index[:-1]]) | (self._begin[index[1:]] != self._end[index[:-1]])
        heads = np.flatnonzero(is_head)
        tails = np.append(heads[1:], len(index)) - 1
        for head, tail in zip(index[heads], index[tails], strict=True):
            yield int(self._begin[head]), int(self._end[tail]), int(steps[head])
