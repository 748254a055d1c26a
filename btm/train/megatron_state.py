"""Whole tensors by Hugging Face names, gathered from what Megatron's processes hold, and shared out to them."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from btm.train.megatron_flat import FlatSlice
from btm.train.megatron_mapping import Entry, join, split
from btm.train.megatron_shape import GptShape
from btm.train.megatron_start import Mesh


@dataclass(frozen=True, slots=True)
class WholeState:
    """Masters and moments of a model, of which every process has a part."""

    flat: FlatSlice
    entries: Sequence[Entry]
    shape: GptShape
    mesh: Mesh

    def gathered(self, kind: str | None) -> Iterator[tuple[str, torch.Tensor]]:
        """On the main rank whole masters (None) or moments by name, on the CPU; every rank runs through it."""
        mesh = self.mesh
        flat = self.flat.whole(kind)
        if mesh.data_rank > 0:
            return
        for entry in self.entries:
            own = self.flat.slots[entry.name].view(flat)
            shards = [torch.empty_like(own) for _ in range(mesh.tensor_size)] if mesh.tensor_rank == 0 else None
            if mesh.tensor_size == 1:
                shards = [own]
            else:
                dist.gather(own, shards, dst=0, group=mesh.tensor_group)
            if shards is not None:
                for name, value in join(entry, shards, self.shape).items():
                    yield name, value.to("cpu", copy=True)

    def fill(self, entry: Entry, kind: str | None, tensors: Sequence[torch.Tensor]) -> None:
        """Take this process's part of the whole masters (None) or moments of one entry, in the order of its sources."""
        shards = split(entry, tensors, self.shape, self.mesh.tensor_size)
        self.flat.fill(entry.name, kind, shards[self.mesh.tensor_rank])

    def fill_masters(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Take this process's part of all masters, by name."""
        for entry in self.entries:
            self.fill(entry, None, [tensors[name] for name in entry.sources])
        self.flat.refresh_weights()
