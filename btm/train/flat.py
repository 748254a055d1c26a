"""All weights of a model in a few flat buffers: one copy, one reduction, one norm, one optimizer call per update."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

_ALIGNMENT = 64
_NORM_CHUNK = 1 << 16
_NUM_EXTRA = 64


@dataclass(frozen=True, slots=True)
class Slot:
    """Where one parameter lies in the buffers."""

    name: str
    shape: torch.Size
    begin: int
    end: int

    def view(self, buffer: torch.Tensor) -> torch.Tensor:
        """The parameter's part of ``buffer``, in its shape."""
        return buffer[self.begin : self.end].view(self.shape)


class FlatParameters:
    """fp32 master weights, their gradients, and the weights that forward and backward use.

    The model's parameters become views of ``weights``; when that is fp32 it is ``masters`` itself. Gradients that
    autograd leaves in ``parameter.grad`` are moved into ``gradients`` at once, where several micro-batches add up in
    fp32 whatever the type of the weights is.

    Attributes:
        slots: Place of each parameter; matrices first, then all others.
        num_decayed: Elements of the matrices, which have weight decay.
        masters: fp32 ``(size,)``.
        gradients: fp32 ``(size,)``; padding is zero.
        extra: fp32 ``(64,)`` behind ``gradients`` in memory, for values that are summed over ranks with them.
        gradients_and_extra: Both in one view.
        weights: ``(size,)`` of the type of forward and backward.
    """

    def __init__(self, model: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
        named = sorted(model.named_parameters(), key=lambda item: item[1].ndim < 2)
        self.slots, self.num_decayed, size = _plan(named)
        self.masters = torch.zeros(size, dtype=torch.float32, device=device)
        self.weights = self.masters if dtype == torch.float32 else torch.zeros(size, dtype=dtype, device=device)
        self.gradients_and_extra = torch.zeros(size + _NUM_EXTRA, dtype=torch.float32, device=device)
        self.gradients, self.extra = self.gradients_and_extra[:size], self.gradients_and_extra[size:]
        self._parameters = [parameter for _, parameter in named]
        self._is_filled = [False] * len(named)
        self._hooks = []
        for index, (slot, parameter) in enumerate(zip(self.slots, self._parameters, strict=True)):
            slot.view(self.masters).copy_(parameter.detach())
            parameter.data = slot.view(self.weights)
            parameter.requires_grad_(True)
            self._hooks.append(parameter.register_post_accumulate_grad_hook(self._taker(index)))
        self.refresh_weights()

    def refresh_weights(self) -> None:
        """Round the master weights to the type of forward and backward."""
        if self.weights is not self.masters:
            self.weights.copy_(self.masters)

    def start_gradients(self) -> None:
        """Begin an update: the next gradient of each parameter replaces what is there."""
        self._is_filled = [False] * len(self.slots)

    def finish_gradients(self) -> None:
        """End an update: parameters that got no gradient get zero."""
        for slot, is_filled in zip(self.slots, self._is_filled, strict=True):
            if not is_filled:
                slot.view(self.gradients).zero_()

    def gradient_norm(self) -> torch.Tensor:
        """Norm of all gradients, fp64 scalar; the same bits on every rank and for every number of threads."""
        parts = torch.linalg.vector_norm(self.gradients.view(-1, _NORM_CHUNK), dim=1)
        return parts.double().square().sum().sqrt()

    def release(self) -> None:
        """Give each parameter memory of its own, as the rest of the world expects it; training ends with this."""
        for hook in self._hooks:
            hook.remove()
        for parameter in self._parameters:
            parameter.data = parameter.data.clone()

    def _taker(self, index: int) -> Callable[[torch.Tensor], None]:
        view = self.slots[index].view(self.gradients)

        def take(parameter: torch.Tensor) -> None:
            if parameter.grad is None:
                return
            if self._is_filled[index]:
                view.add_(parameter.grad)
            else:
                view.copy_(parameter.grad)
                self._is_filled[index] = True
            parameter.grad = None

        return take


def _plan(named: list[tuple[str, nn.Parameter]]) -> tuple[list[Slot], int, int]:
    slots, begin, num_decayed = [], 0, 0
    for name, parameter in named:
        slots.append(Slot(name, parameter.shape, begin, begin + parameter.numel()))
        begin = _round_up(begin + parameter.numel(), _ALIGNMENT)
        if parameter.ndim >= 2:
            num_decayed = begin
    return slots, num_decayed, max(_NORM_CHUNK, _round_up(begin, _NORM_CHUNK))


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
