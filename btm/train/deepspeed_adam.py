"""The AdamW that DeepSpeed is given: the torch engine's, with a gate."""

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from btm.config_train import TrainConfig
from btm.train.expert_steps import StepCounts, Stretches, adamw_step
from btm.train.gathered_tensors import MOMENTS


class GatedAdamW(torch.optim.AdamW):
    """AdamW that steps only when the engine says so: DeepSpeed also steps to initialise and to forget gradients.

    DeepSpeed replaces the parameters by its own flat tensors, and calls :meth:`step` once for each of them or for all.
    Idle experts inside of these stay as they are, as under :class:`btm.train.flat_adam.FlatAdamW`.

    Attributes:
        steps: Steps of the shared weights and of each expert.
        stretches: What lies in each tensor that is stepped on.
    """

    def __init__(self, groups: list[dict[str, Any]], train: TrainConfig, num_experts: int) -> None:
        super().__init__(groups, lr=train.lr, betas=(train.beta1, train.beta2), eps=train.eps, fused=True)
        self.steps = StepCounts(num_experts)
        self.stretches: Mapping[torch.Tensor, Stretches] = {}
        self._train = train
        self._gradient_scale = 1.0
        self._is_busy = np.zeros(num_experts, dtype=bool)
        self._is_open = False

    def step(self, closure: Any = None) -> Any:
        """Step if the gate is open."""
        del closure
        for group in self.param_groups if self._is_open else []:
            masters = [master for master in group["params"] if master.grad is not None]
            adamw_step(
                [part for master in masters for part in self._parts(master)],
                self._train,
                learning_rate=group["lr"],
                gradient_scale=self._gradient_scale,
                is_decayed=group["weight_decay"] > 0,
            )

    @contextlib.contextmanager
    def opened(self, learning_rate: float, gradient_scale: float, is_busy: np.ndarray) -> Iterator[None]:
        """Open the gate for one step.

        Args:
            learning_rate: Of this step.
            gradient_scale: Gradients are divided by it first.
            is_busy: For each expert whether a token of the update reached it, bool ``(experts,)``.
        """
        for group in self.param_groups:
            group["lr"] = learning_rate
        self._gradient_scale, self._is_busy, self._is_open = gradient_scale, is_busy, True
        try:
            yield
        finally:
            self._is_open = False
        self.steps.count(is_busy)

    def _parts(self, master: torch.Tensor) -> Iterator[tuple[list[torch.Tensor], int]]:
        assert master.grad is not None
        tensors = (master.detach(), master.grad, *(self.state[master][kind] for kind in MOMENTS))
        flat = [tensor.view(-1) for tensor in tensors]
        for begin, end, steps in self.steps.runs(self.stretches[master], self._is_busy):
            yield [tensor[begin:end] for tensor in flat], steps


def gated_adamw(parameters: Iterable[nn.Parameter], train: TrainConfig, num_experts: int) -> GatedAdamW:
    """The optimizer of ``train`` (https://arxiv.org/abs/1711.05101), with weight decay of matrices alone.

    Args:
        parameters: Those of experts that processes share out carry the name of their group, see
            :func:`btm.train.deepspeed_start.mark_expert`.
        train: Recipe.
        num_experts: Of all layers, those of other processes included.
    """
    groups: dict[tuple[bool, str], dict[str, Any]] = {}
    for parameter in parameters:
        is_decayed, name = parameter.ndim >= 2, getattr(parameter, "group_name", "")
        decay = {"weight_decay": train.weight_decay if is_decayed else 0.0}
        own = {"params": [], **decay, **({"name": name, "moe": True} if name else {})}
        groups.setdefault((is_decayed, name), own)["params"].append(parameter)
    # Equal on all processes, whatever comes first in a model.
    return GatedAdamW([groups[key] for key in sorted(groups)], train, num_experts)
