"""Whole tensors by Hugging Face names, gathered from what Megatron's processes hold, and shared out to them."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.distributed as dist

from btm.train.expert_steps import StepCounts
from btm.train.megatron_flat import FlatSlice
from btm.train.megatron_mapping import Entry, join, split
from btm.train.megatron_shape import GptShape
from btm.train.megatron_start import Mesh


@dataclass(frozen=True)
class WholeState:
    """Masters and moments of which every tensor-parallel and data-parallel process has a part."""

    flat: FlatSlice
    entries: Sequence[Entry]
    shape: GptShape
    mesh: Mesh

    def gathered(self, kind: str | None) -> Iterator[tuple[str, torch.Tensor]]:
        """On the main rank whole masters (None) or moments by name, on the CPU; every rank runs through it."""
        flat = self.flat.whole(kind)
        if self.mesh.data_rank > 0:
            return
        for entry in self.entries:
            for name, value in self._named(entry, self._shards(entry, flat)):
                yield name, value.to("cpu", copy=True)

    def fill(self, entry: Entry, kind: str | None, tensors: Sequence[torch.Tensor]) -> None:
        """Take this process's part of the whole masters (None) or moments of one entry, in the order of its sources."""
        shards = split(entry, tensors, self.shape, self.mesh.tensor_size)
        self.flat.fill(entry.name, kind, shards[self.mesh.tensor_rank])

    def _named(self, entry: Entry, shards: list[torch.Tensor] | None) -> Iterator[tuple[str, torch.Tensor]]:
        if shards is not None:
            yield from join(entry, shards, self.shape).items()

    def _shards(self, entry: Entry, flat: torch.Tensor) -> list[torch.Tensor] | None:
        """On the first of the tensor-parallel processes the slices of all of them."""
        own = self.flat.slots[entry.name].view(flat)
        return _gathered(own, self.mesh.tensor_group, self.mesh.tensor_rank)


class SpreadState(WholeState):
    """The same for experts of which every process of an expert-parallel group has an equal share.

    The sources of an entry are a tensor of each share, or a single one, whose rows are shared out.
    """

    def fill(self, entry: Entry, kind: str | None, tensors: Sequence[torch.Tensor]) -> None:
        """See :meth:`WholeState.fill`."""
        parts = tensors if len(tensors) > 1 else tensors[0].chunk(self.mesh.expert_size)
        super().fill(entry, kind, [parts[self.mesh.expert_rank]])

    def _named(self, entry: Entry, shards: list[torch.Tensor] | None) -> Iterator[tuple[str, torch.Tensor]]:
        if shards is None:
            return
        (own,) = join(replace(entry, sources=entry.sources[:1]), shards, self.shape).values()
        parts = _gathered(own, self.mesh.expert_group, self.mesh.expert_rank)
        if parts is not None:
            yield from zip(entry.sources, parts if len(entry.sources) > 1 else [torch.cat(parts)], strict=True)


@dataclass(frozen=True, slots=True)
class ModelState:
    """All weights of a model, with their gradients and moments, as their parts are shared out."""

    parts: Sequence[WholeState]

    @property
    def steps(self) -> StepCounts:
        """Steps of the shared weights and of each expert."""
        return self.parts[0].flat.steps

    def set_steps(self, num_steps: int) -> None:
        """Let all parts have the steps of the experts that the first one has, and so many of the shared weights."""
        for part in self.parts:
            part.flat.steps.shared = num_steps
            part.flat.steps.experts.copy_(self.steps.experts)

    def start_gradients(self) -> None:
        """Begin an update: the next gradient of each parameter replaces what is there."""
        for part in self.parts:
            part.flat.start_gradients()

    def reduce_gradients(self) -> torch.Tensor:
        """End an update; see :meth:`FlatSlice.reduce_gradients`. Collective."""
        return torch.stack([part.flat.reduce_gradients() for part in self.parts]).sum()

    def step(self, learning_rate: float, gradient_divisor: float, is_busy: np.ndarray) -> None:
        """See :meth:`FlatSlice.step`. Collective."""
        for part in self.parts:
            part.flat.step(learning_rate, gradient_divisor, is_busy)

    def gathered(self, kind: str | None) -> Iterator[tuple[str, torch.Tensor]]:
        """On the main rank whole masters (None) or moments by name, on the CPU; every rank runs through it."""
        for part in self.parts:
            yield from part.gathered(kind)

    def fill(self, kind: str | None, tensor_of: Callable[[str], torch.Tensor]) -> None:
        """Take this process's part of whole masters (None) or moments.

        Args:
            kind: Which.
            tensor_of: Called with each name once, in the same order on all processes.
        """
        for part in self.parts:
            for entry in part.entries:
                part.fill(entry, kind, [tensor_of(name) for name in entry.sources])

    def refresh_weights(self) -> None:
        """Let forward and backward see the masters. Collective."""
        for part in self.parts:
            part.flat.refresh_weights()


def _gathered(own: torch.Tensor, group: dist.ProcessGroup, rank: int) -> list[torch.Tensor] | None:
    """On the first process of a group what all of them have."""
    if group.size() == 1:
        return [own]
    parts = [torch.empty_like(own) for _ in range(group.size())] if rank == 0 else None
    dist.gather(own, parts, group=group, group_dst=0)
    return parts
