"""Checkpoint files of engines that gather every tensor on the main process, and hand it out from there."""

from collections.abc import Mapping

import torch
import torch.distributed as dist

from btm.train.ranks import Ranks, naming_lost_peers

MOMENTS = ("exp_avg", "exp_avg_sq")
FILES = {"model.safetensors": (None,), "optimizer.safetensors": MOMENTS}
"""File name -> what it holds of each parameter: the master weight (None), or moments."""
Files = Mapping[str, dict[str, torch.Tensor]]
"""File name -> tensor name -> whole fp32 tensor; without tensors on all processes but the main one."""


def tensor_name(kind: str | None, name: str) -> str:
    """Name in a checkpoint of the master weight (None) or a moment of a parameter."""
    return name if kind is None else f"{kind}.{name}"


def taken_from_main(ranks: Ranks, tensors: dict[str, torch.Tensor], name: str, shape: torch.Size) -> torch.Tensor:
    """What the main process has under ``name``, which it forgets; every process calls it.

    Args:
        ranks: The processes.
        tensors: Of one file.
        name: In this file.
        shape: Of the tensor.

    Returns:
        fp32, on the device of this process.

    Raises:
        PeerLostError: If a process is gone.
    """
    if ranks.is_main:
        value = tensors.pop(name).to(ranks.device)
    else:
        value = torch.empty(shape, dtype=torch.float32, device=ranks.device)
    if ranks.size > 1:
        with naming_lost_peers():
            dist.broadcast(value, src=0)
    return value


def copy_from_main(ranks: Ranks, tensor: torch.Tensor) -> None:
    """Give ``tensor`` the values that the main process has; every process calls it.

    Raises:
        PeerLostError: If a process is gone.
    """
    if ranks.size > 1:
        value = tensor.to(ranks.device)
        with naming_lost_peers():
            dist.broadcast(value, src=0)
        tensor.copy_(value)
