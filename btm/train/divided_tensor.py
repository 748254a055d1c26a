"""A tensor whose rows lie on several processes: written to a checkpoint and read from it as if it were whole."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist

from btm.train.ranks import Ranks, naming_lost_peers


@dataclass(frozen=True, slots=True)
class DividedTensor:
    """Rows of a contiguous fp32 tensor, divided over the first processes of a group in the order of their ranks.

    Nothing but one such tensor at a time is ever whole, and that only in the memory of the process that writes.
    """

    shape: torch.Size
    """Of the whole tensor."""
    rows: tuple[range, ...]
    """Rows of each process that speaks for its share; other processes hold the same as one of these."""
    index: int
    """Number of this process's share."""
    local: torch.Tensor | None
    """This process's rows, contiguous; None where there are none."""
    ranks: Ranks

    def numel(self) -> int:
        """Elements of the whole tensor."""
        return self.shape.numel()

    @property
    def local_offset(self) -> int:
        """Elements before this process's own."""
        return self.rows[self.index].start * self._row_size

    def whole(self) -> torch.Tensor:
        """All rows, on the CPU; only on the main process, while the others call :meth:`contribute`.

        Raises:
            PeerLostError: If a process is gone.
        """
        result = torch.empty(self.shape, dtype=torch.float32)
        for rank, rows in enumerate(self.rows):
            if not rows:
                continue
            if rank == self.ranks.rank:
                assert self.local is not None
                part = self.local.detach()
            else:
                part = torch.empty((len(rows), *self.shape[1:]), dtype=torch.float32, device=self.ranks.device)
                with naming_lost_peers():
                    dist.recv(part, src=rank)
            result[rows.start : rows.stop].copy_(part.view(len(rows), *self.shape[1:]))
        return result

    def contribute(self) -> None:
        """Send this process's rows to the main process, if it speaks for its share.

        Raises:
            PeerLostError: If the main process is gone.
        """
        if self.ranks.rank >= len(self.rows) or self.local is None or self.ranks.is_main:
            return
        with naming_lost_peers():
            dist.send(self.local.detach().contiguous(), dst=0)

    @property
    def _row_size(self) -> int:
        return self.shape[1:].numel()


def contribute_all(files: Iterable[Mapping[str, "torch.Tensor | DividedTensor"]]) -> None:
    """On all processes but the main one: take part in the writing of ``files``, in the order of their tensors.

    Raises:
        PeerLostError: If the main process is gone.
    """
    for tensors in files:
        for tensor in tensors.values():
            if isinstance(tensor, DividedTensor):
                tensor.contribute()
