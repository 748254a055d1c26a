"""One process's slice of all weights in flat buffers: one reduction, one norm, one optimizer call per update.

Weights and gradients of the tensor-parallel slice are whole on every data-parallel process; fp32 master weights and
moments are cut into equal stretches, one per data-parallel process (ZeRO 1, https://arxiv.org/abs/1910.02054).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from btm.config_train import TrainConfig
from btm.train.expert_steps import StepCounts
from btm.train.flat import NOBODY, Owners, Span, sum_of_squares
from btm.train.flat_adam import FlatAdamW
from btm.train.gathered_tensors import MOMENTS
from btm.train.megatron_layout import FlatLayout
from btm.train.megatron_mapping import Entry
from btm.train.megatron_start import Mesh


@dataclass(frozen=True, slots=True)
class _Stretch:
    """What one process steps on."""

    masters: torch.Tensor
    gradients: torch.Tensor
    spans: Sequence[Span]


class FlatSlice:
    """Weights, gradients, masters, moments and the AdamW (https://arxiv.org/abs/1711.05101) that steps on them.

    What every tensor-parallel process has gets its gradients from all of these processes and stays the same bits there.
    Of an expert that no token of an update reached neither weights nor moments nor steps change.

    Attributes:
        slots: Place of each parameter, by name.
        weights: ``(size,)`` of the type of forward and backward; the model's parameters are views of it.
        gradients: fp32 ``(size,)``.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        entries: Sequence[Entry],
        mesh: Mesh,
        *,
        train: TrainConfig,
        dtype: torch.dtype,
        device: torch.device,
        owners: Owners = NOBODY,
        num_owners: int = 0,
    ) -> None:
        """Take over ``parameters``, whose values are lost.

        Args:
            parameters: Of this process, by Megatron's names.
            entries: What they are.
            mesh: Where this process stands.
            train: Recipe.
            dtype: Of forward and backward.
            device: Where the buffers lie.
            owners: By Megatron's names, of what experts own.
            num_owners: Experts of the model.
        """
        self._mesh = mesh
        shapes = {name: parameter.shape for name, parameter in parameters.items()}
        layout = FlatLayout.of(shapes, entries, owners, num_stretches=mesh.data_size)
        self.slots, self._copied = layout.slots, layout.copied
        # A process counts each gradient once: those that all compute on the first of the tensor-parallel processes.
        self._is_dropped = {entry.name: entry.is_repeated and mesh.tensor_rank > 0 for entry in entries}
        stretch = layout.size // mesh.data_size
        self._own = slice(mesh.data_rank * stretch, (mesh.data_rank + 1) * stretch)
        self.weights = torch.zeros(layout.size, dtype=dtype, device=device)
        self.gradients = torch.zeros(layout.size, dtype=torch.float32, device=device)
        self._is_exact = dtype == torch.float32
        self._masters = self.weights[self._own] if self._is_exact else torch.zeros(stretch, device=device)
        self._own_gradients = self.gradients if mesh.data_size == 1 else torch.zeros(stretch, device=device)
        self._filled: set[str] = set()
        for name, slot in self.slots.items():
            parameters[name].data = slot.view(self.weights)
            parameters[name].register_post_accumulate_grad_hook(self._taker(name))
        own = _Stretch(self._masters, self._own_gradients, layout.spans_of(self._own))
        self._adam = FlatAdamW(own, train, num_owners)
        moments: dict[str, torch.Tensor] = {}
        moments.update(zip(MOMENTS, self._adam.moments, strict=True))
        self._moments = moments

    @property
    def steps(self) -> StepCounts:
        """Steps of the shared weights and of each expert."""
        return self._adam.steps

    def start_gradients(self) -> None:
        """Begin an update: the next gradient of each parameter replaces what is there."""
        self._filled.clear()

    def reduce_gradients(self) -> torch.Tensor:
        """End an update: sum gradients over all processes that have a part of them. Collective.

        Returns:
            fp64 scalar: this process's share of the squared norm; the shares of all processes add up to it.
        """
        for name, slot in self.slots.items():
            if name not in self._filled or self._is_dropped[name]:
                slot.view(self.gradients).zero_()
        if self._mesh.tensor_size > 1 and self.gradients[self._copied].numel():
            dist.all_reduce(self.gradients[self._copied], group=self._mesh.tensor_group)
        if self._mesh.data_size > 1:
            dist.reduce_scatter_tensor(self._own_gradients, self.gradients, group=self._mesh.data_group)
        if self._mesh.tensor_rank == 0:
            return sum_of_squares(self._own_gradients)
        begin, end = (
            max(0, min(border - self._own.start, len(self._own_gradients)))
            for border in (self._copied.start, self._copied.stop)
        )
        return sum_of_squares(self._own_gradients[:begin]) + sum_of_squares(self._own_gradients[end:])

    def step(self, learning_rate: float, gradient_divisor: float, is_busy: np.ndarray) -> None:
        """Step on this process's stretch and exchange the new weights. Collective.

        Args:
            learning_rate: Of this step.
            gradient_divisor: What the summed gradients are divided by.
            is_busy: For each expert whether a token of the update reached it, bool ``(experts,)``.
        """
        self._adam.step(learning_rate, gradient_divisor, is_busy)
        self.refresh_weights()

    def refresh_weights(self) -> None:
        """Round the masters to the type of forward and backward, and gather those of the others. Collective."""
        if not self._is_exact:
            self.weights[self._own].copy_(self._masters)
        if self._mesh.data_size > 1:
            own = self.weights[self._own].clone()
            dist.all_gather_into_tensor(self.weights, own, group=self._mesh.data_group)

    def whole(self, kind: str | None) -> torch.Tensor:
        """Masters (None) or a moment of the whole tensor-parallel slice, fp32 ``(size,)``. Collective."""
        own = self._masters if kind is None else self._moments[kind]
        if self._mesh.data_size == 1:
            return own
        result = torch.empty(self.gradients.shape, device=own.device)
        dist.all_gather_into_tensor(result, own.clone(), group=self._mesh.data_group)
        return result

    def fill(self, name: str, kind: str | None, value: torch.Tensor) -> None:
        """Take this process's stretch of the slice ``value`` of a master (None) or moment."""
        slot = self.slots[name]
        if value.shape != slot.shape:
            raise ValueError(f"{name} has shape {list(slot.shape)}, got {list(value.shape)}")
        own = self._masters if kind is None else self._moments[kind]
        begin, end = max(slot.begin, self._own.start), min(slot.end, self._own.stop)
        if begin < end:
            part = value.flatten()[begin - slot.begin : end - slot.begin]
            own[begin - self._own.start : end - self._own.start].copy_(part)

    def _taker(self, name: str) -> Callable[[torch.Tensor], None]:
        view = self.slots[name].view(self.gradients)

        def take(parameter: torch.Tensor) -> None:
            if parameter.grad is None:
                return
            if name in self._filled:
                view.add_(parameter.grad)
            else:
                view.copy_(parameter.grad)
                self._filled.add(name)
            parameter.grad = None

        return take
