"""The AdamW that DeepSpeed is given: the torch engine's, with a gate."""

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from btm.config_train import TrainConfig


class GatedAdamW(torch.optim.AdamW):
    """AdamW that steps only when the engine says so: DeepSpeed also steps to initialise and to forget gradients."""

    grad_scale: torch.Tensor
    """What the fused kernel divides gradients by."""
    is_open = False

    def step(self, closure: Any = None) -> Any:
        """Step if the gate is open."""
        return super().step(closure) if self.is_open else None

    @contextlib.contextmanager
    def opened(self) -> Iterator[None]:
        """Open the gate."""
        self.is_open = True
        try:
            yield
        finally:
            self.is_open = False


def gated_adamw(parameters: Iterable[nn.Parameter], train: TrainConfig) -> GatedAdamW:
    """The optimizer of ``train`` (https://arxiv.org/abs/1711.05101), with weight decay of matrices alone."""
    groups: list[dict[str, Any]] = [
        {"params": [], "weight_decay": train.weight_decay},
        {"params": [], "weight_decay": 0.0},
    ]
    for parameter in parameters:
        groups[parameter.ndim < 2]["params"].append(parameter)
    filled = [group for group in groups if group["params"]]
    return GatedAdamW(filled, lr=train.lr, betas=(train.beta1, train.beta2), eps=train.eps, fused=True)
