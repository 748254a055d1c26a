"""All weights of a model in a few flat buffers: one copy, one reduction, one norm, one optimizer call per update."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import nn

_ALIGNMENT = 64
_NORM_CHUNK = 1 << 12  # short, because the squares of one chunk are added up in fp32
_NUM_EXTRA = 64
SHARED = -1
"""Owner of weights that every token uses."""
Owners = Mapping[str, tuple[int, ...]]
"""Parameter name -> number of the expert that alone uses it, or one number for each row of a stack of experts."""
NOBODY: Owners = MappingProxyType({})
"""Owners of a model without experts."""


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


@dataclass(frozen=True, slots=True)
class Span:
    """A stretch of the buffers whose elements are treated alike by the optimizer."""

    begin: int
    end: int
    is_decayed: bool
    """Whether it holds matrices, which have weight decay."""
    owner: int
    """Number of the expert that alone uses it, or :data:`SHARED`."""
    is_frozen: bool


class FlatParameters:
    """fp32 master weights, their gradients, and the weights that forward and backward use.

    The model's parameters become views of ``weights``; when that is fp32 it is ``masters`` itself. Gradients that
    autograd leaves in ``parameter.grad`` are moved into ``gradients`` at once, where several micro-batches add up in
    fp32 whatever the type of the weights is.

    Weights of one expert alone lie in spans of their own, so that an optimizer can leave out those that no token of an
    update reached. Weights that only this process and its replicas hold come first, all others behind them.

    Attributes:
        slots: Place of each parameter.
        spans: Division of the buffers by weight decay and owner; frozen ones are left alone.
        num_local: Elements at the front of the buffers that other processes do not have.
        masters: fp32 ``(size,)``.
        gradients: fp32 ``(size,)``; padding is zero.
        extra: fp32 ``(64,)`` or more behind ``gradients`` in memory, for values that are summed over ranks with them.
        common_gradients_and_extra: All behind the local gradients, in one view.
        weights: ``(size,)`` of the type of forward and backward.
    """

    def __init__(
        self,
        model: nn.Module,
        device: torch.device,
        dtype: torch.dtype,
        *,
        owners: Owners = NOBODY,
        local: Collection[str] = (),
        num_extra: int = _NUM_EXTRA,
    ) -> None:
        """Move the parameters of ``model`` into buffers.

        Args:
            model: Its frozen parameters (``requires_grad`` is False) stay frozen.
            device: Where the buffers lie.
            dtype: Of forward and backward.
            owners: Of parameters that experts own.
            local: Names of parameters that only this process and its replicas hold.
            num_extra: Values that ``extra`` must have room for.
        """
        named = _ordered(model, owners, local)
        self.slots, self.spans, self.num_local, size = _plan(named, owners, local)
        self.masters = torch.zeros(size, dtype=torch.float32, device=device)
        self.weights = self.masters if dtype == torch.float32 else torch.zeros(size, dtype=dtype, device=device)
        buffer = torch.zeros(size + _round_up(num_extra, _NUM_EXTRA), dtype=torch.float32, device=device)
        self.gradients, self.extra = buffer[:size], buffer[size:]
        self.common_gradients_and_extra = buffer[self.num_local :]
        self._parameters = [parameter for _, parameter in named]
        self._is_filled = [False] * len(named)
        self._hooks = []
        for index, (slot, parameter) in enumerate(zip(self.slots, self._parameters, strict=True)):
            slot.view(self.masters).copy_(parameter.detach())
            parameter.data = slot.view(self.weights)
            if parameter.requires_grad:
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

    def gradient_squares(self) -> torch.Tensor:
        """Sums of the squares of the local and of the common gradients, fp64 ``(2,)``.

        Those of equal gradients have the same bits on every rank and for every number of threads.
        """
        parts = torch.linalg.vector_norm(self.gradients.view(-1, _NORM_CHUNK), dim=1).double().square()
        num_local = self.num_local // _NORM_CHUNK
        return torch.stack([parts[:num_local].sum(), parts[num_local:].sum()])

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


def sum_of_squares(values: torch.Tensor) -> torch.Tensor:
    """Sum of the squares of fp32 ``values`` (N,), as an fp64 scalar, without a copy of them in fp64."""
    border = len(values) // _NORM_CHUNK * _NORM_CHUNK
    parts = torch.linalg.vector_norm(values[:border].view(-1, _NORM_CHUNK), dim=1).double().square()
    return parts.sum() + torch.linalg.vector_norm(values[border:], dtype=torch.float64).square()


def _ordered(model: nn.Module, owners: Owners, local: Collection[str]) -> list[tuple[str, nn.Parameter]]:
    """Parameters so that spans are few: local before common, matrices first, shared before frozen before owned ones."""

    def place(item: tuple[str, nn.Parameter]) -> tuple[bool, bool, int, int]:
        name, parameter = item
        kind = 1 if not parameter.requires_grad else 2 * (name in owners)
        return name not in local, parameter.ndim < 2, kind, owners[name][0] if kind == 2 else 0

    return sorted(model.named_parameters(), key=place)


def _plan(
    named: list[tuple[str, nn.Parameter]], owners: Owners, local: Collection[str]
) -> tuple[list[Slot], list[Span], int, int]:
    """Slots, spans, number of local elements, number of all."""
    slots: list[Slot] = []
    heads: list[tuple[int, bool, int, bool]] = []
    begin, num_local = 0, 0
    for name, parameter in named:
        if local and name not in local and not num_local:
            begin = num_local = _round_up(begin, _NORM_CHUNK)
        rows = (SHARED,) if not parameter.requires_grad else owners.get(name, (SHARED,))
        for number, owner in enumerate(rows):
            kind = (parameter.ndim >= 2, owner, not parameter.requires_grad)
            if not heads or heads[-1][1:] != kind:
                heads.append((begin + number * parameter.numel() // len(rows), *kind))
        slots.append(Slot(name, parameter.shape, begin, begin + parameter.numel()))
        begin = _round_up(begin + parameter.numel(), _ALIGNMENT)
    size = max(_NORM_CHUNK, _round_up(begin, _NORM_CHUNK))
    ends = [*(head[0] for head in heads[1:]), size]
    spans = [Span(head[0], end, *head[1:]) for head, end in zip(heads, ends, strict=True)]
    return slots, spans, num_local, size


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
