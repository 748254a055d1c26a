"""All weights of a model in a few flat buffers: one copy, one reduction, one norm, one optimizer call per update."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import nn

_ALIGNMENT = 64
_NORM_CHUNK = 1 << 16
_NUM_EXTRA = 64
NUM_VALUES = 2
"""Values of ``FlatParameters.extra`` that are the caller's; marks of owners follow them."""
_SHARED, _FROZEN = "", "frozen"
_NONE: Mapping[str, str] = MappingProxyType({})


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
    owner: str
    """Expert that alone uses it; empty for weights that every token uses."""
    is_frozen: bool

    @property
    def name(self) -> str:
        """Unique among the spans of a model."""
        return f"{self.owner}.{'matrices' if self.is_decayed else 'vectors'}"


class FlatParameters:
    """fp32 master weights, their gradients, and the weights that forward and backward use.

    The model's parameters become views of ``weights``; when that is fp32 it is ``masters`` itself. Gradients that
    autograd leaves in ``parameter.grad`` are moved into ``gradients`` at once, where several micro-batches add up in
    fp32 whatever the type of the weights is.

    Experts that no token reached in an update have no gradient rather than a gradient of zero: an optimizer that moved
    them by momentum or decay would undo what they know. Their parameters lie in spans of their own.

    Attributes:
        slots: Place of each parameter; matrices first, then all others.
        spans: Division of the buffers by weight decay and owner; frozen ones are left alone.
        owners: Owners of the spans that can be idle.
        masters: fp32 ``(size,)``.
        gradients: fp32 ``(size,)``; padding is zero.
        extra: fp32 ``(64,)`` or more behind ``gradients`` in memory, for values that are summed over ranks with them.
        gradients_and_extra: Both in one view.
        weights: ``(size,)`` of the type of forward and backward.
    """

    def __init__(
        self, model: nn.Module, device: torch.device, dtype: torch.dtype, owners: Mapping[str, str] = _NONE
    ) -> None:
        """Move the parameters of ``model`` into buffers.

        Args:
            model: Its frozen parameters (``requires_grad`` is False) stay frozen.
            device: Where the buffers lie.
            dtype: Of forward and backward.
            owners: Parameter name -> expert that alone uses it.
        """
        named = _ordered(model, owners)
        self.slots, self.spans, size = _plan(named, owners)
        self.owners = tuple(dict.fromkeys(span.owner for span in self.spans if span.owner and not span.is_frozen))
        num_extra = _round_up(NUM_VALUES + len(self.owners), _NUM_EXTRA)
        self._owner_of = [owners.get(slot.name, _SHARED) for slot in self.slots]
        self.masters = torch.zeros(size, dtype=torch.float32, device=device)
        self.weights = self.masters if dtype == torch.float32 else torch.zeros(size, dtype=dtype, device=device)
        self.gradients_and_extra = torch.zeros(size + num_extra, dtype=torch.float32, device=device)
        self.gradients, self.extra = self.gradients_and_extra[:size], self.gradients_and_extra[size:]
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
        """End an update: parameters that got no gradient get zero, and owners that got one are marked in ``extra``."""
        busy = set()
        for slot, owner, is_filled in zip(self.slots, self._owner_of, self._is_filled, strict=True):
            if is_filled:
                busy.add(owner)
            else:
                slot.view(self.gradients).zero_()
        if self.owners:
            marks = torch.tensor([float(owner in busy) for owner in self.owners])
            self.extra[NUM_VALUES : NUM_VALUES + len(marks)].copy_(marks)

    def busy_owners(self) -> set[str]:
        """Owners that got a gradient on some rank, after the sum over ranks."""
        if not self.owners:
            return set()
        marks = self.extra[NUM_VALUES : NUM_VALUES + len(self.owners)].tolist()
        return {owner for owner, mark in zip(self.owners, marks, strict=True) if mark > 0}

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


def _ordered(model: nn.Module, owners: Mapping[str, str]) -> list[tuple[str, nn.Parameter]]:
    """Parameters so that each span is one stretch: matrices first, shared before frozen before each owner's."""
    rank = {name: number for number, name in enumerate(dict.fromkeys([_SHARED, _FROZEN, *owners.values()]))}

    def place(item: tuple[str, nn.Parameter]) -> tuple[bool, int]:
        name, parameter = item
        return parameter.ndim < 2, rank[owners.get(name, _SHARED) if parameter.requires_grad else _FROZEN]

    return sorted(model.named_parameters(), key=place)


def _plan(named: list[tuple[str, nn.Parameter]], owners: Mapping[str, str]) -> tuple[list[Slot], list[Span], int]:
    slots: list[Slot] = []
    heads: list[tuple[int, bool, str, bool]] = []
    begin = 0
    for name, parameter in named:
        is_frozen = not parameter.requires_grad
        kind = (parameter.ndim >= 2, _FROZEN if is_frozen else owners.get(name, _SHARED), is_frozen)
        if not heads or heads[-1][1:] != kind:
            heads.append((begin, *kind))
        slots.append(Slot(name, parameter.shape, begin, begin + parameter.numel()))
        begin = _round_up(begin + parameter.numel(), _ALIGNMENT)
    size = max(_NORM_CHUNK, _round_up(begin, _NORM_CHUNK))
    ends = [*(head[0] for head in heads[1:]), size]
    spans = [Span(head[0], end, *head[1:]) for head, end in zip(heads, ends, strict=True)]
    return slots, spans, size


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
