"""The processes that train one model together: who this one is, and the sums that all of them agree on."""

import datetime
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from btm.errors import TrainingError
from moe_kernels.exchange import ExchangeError

TIMEOUT = datetime.timedelta(minutes=30)
"""How long processes wait for each other."""
_TRANSPORT = ("gloo", "nccl", "connection", "peer", "socket")
"""Words in the errors of a broken connection."""


class PeerLostError(RuntimeError):
    """Another process of the group is gone; the task can be started again and continues from its checkpoint."""


@dataclass(frozen=True, slots=True)
class Ranks:
    """Position of this process in its group, and the device that it computes on."""

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    group: dist.ProcessGroup | None = None
    """These processes; None is all that there are."""

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and logs."""
        return self.rank == 0

    def sum_(self, tensor: torch.Tensor, group: dist.ProcessGroup | None = None) -> torch.Tensor:
        """Replace ``tensor`` by its sum over these processes, or those of a group; all get the same bits.

        Raises:
            PeerLostError: If a process is gone.
        """
        if self.size > 1:
            with naming_lost_peers():
                dist.all_reduce(tensor, group=group or self.group)
        return tensor

    def from_main(self, value: int) -> int:
        """The value that the main process has.

        Raises:
            PeerLostError: If a process is gone.
        """
        if self.size == 1:
            return value
        tensor = torch.tensor([value], dtype=torch.int64, device=self.device)
        with naming_lost_peers():
            dist.broadcast(tensor, group=self.group, group_src=0)
        return int(tensor.item())


@contextmanager
def joined_ranks(environment: Mapping[str, str] = os.environ) -> Iterator[Ranks]:
    """Join the group that ``RANK``, ``LOCAL_RANK``, ``WORLD_SIZE`` and ``RENDEZVOUS_FILE`` describe, and leave it.

    Where there are several nodes ``MASTER_ADDR`` and ``MASTER_PORT`` take the place of the file, as ``torchrun`` sets
    them, too. gloo on CPUs, NCCL on GPUs. Without these variables there is one process and no group.

    Raises:
        TrainingError: If the variables contradict each other.
        PeerLostError: If the others do not come.
    """
    rank, size = int(environment.get("RANK", "0")), int(environment.get("WORLD_SIZE", "1"))
    local_rank = int(environment.get("LOCAL_RANK", str(rank)))
    if not 0 <= rank < size:
        raise TrainingError(f"RANK={rank} is not below WORLD_SIZE={size}; set both as the launcher does")
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", local_rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
    if size == 1:
        yield Ranks(0, 1, device)
        return
    rendezvous = environment.get("RENDEZVOUS_FILE")
    if not rendezvous and not (environment.get("MASTER_ADDR") and environment.get("MASTER_PORT")):
        raise TrainingError(
            f"WORLD_SIZE={size} needs RENDEZVOUS_FILE, a fresh path that all processes can open, or MASTER_ADDR and "
            "MASTER_PORT; a launcher sets them"
        )
    with naming_lost_peers():
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            init_method=f"file://{rendezvous}" if rendezvous else "env://",
            rank=rank,
            world_size=size,
            timeout=TIMEOUT,
        )
    yield Ranks(rank, size, device)
    # Not after an exception: the others may be gone, and leaving would wait for them.
    dist.destroy_process_group()


@contextmanager
def naming_lost_peers() -> Iterator[None]:
    """Tell errors of communication, the only ones that the block can have, as the loss of a process."""
    try:
        yield
    except RuntimeError as error:
        raise PeerLostError(f"a process of this group is gone ({str(error).splitlines()[0]})") from error


@contextmanager
def naming_lost_exchanges() -> Iterator[None]:
    """Tell a broken connection from the other errors that forward, backward and an engine's library can have.

    Raises:
        PeerLostError: If a process is gone.
    """
    try:
        yield
    except RuntimeError as error:
        text = str(error).lower()
        is_transport = isinstance(error, dist.DistError) or any(word in text for word in _TRANSPORT)
        if isinstance(error, PeerLostError) or not (is_transport or isinstance(error, ExchangeError)):
            raise
        raise PeerLostError(f"a process of this group is gone ({str(error).splitlines()[0]})") from error
