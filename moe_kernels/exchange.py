"""Rows that travel between the processes of a group: variable-split all-to-all, with gradients.

Every rank must take part in every exchange, and in its backward pass, equally often, also without rows. Written for
gloo and NCCL groups handed in by the caller.

Shapes: N rows of this rank, R rows that it receives, D model width.
"""

import torch
import torch.distributed as dist

from moe_kernels.errors import MoeError


class ExchangeError(RuntimeError):
    """Not all ranks of the group took part in an exchange in the same way."""


def _all_to_all(
    out: torch.Tensor, rows: torch.Tensor, receive: list[int], send: list[int], group: dist.ProcessGroup
) -> None:
    try:
        dist.all_to_all_single(out, rows.contiguous(), receive, send, group=group)
    except RuntimeError as error:
        raise ExchangeError(
            f"rank {dist.get_rank(group)} of {dist.get_world_size(group)} waited in vain for others: every rank must "
            f"call the layer and backward equally often, also without tokens ({error})"
        ) from error


class _Exchange(torch.autograd.Function):
    """All-to-all of rows; its gradient is the all-to-all with the splits swapped."""

    @staticmethod
    def forward(
        ctx, rows_ND: torch.Tensor, send: list[int], receive: list[int], group: dist.ProcessGroup
    ) -> torch.Tensor:
        ctx.send, ctx.receive, ctx.group = send, receive, group
        out_RD = rows_ND.new_empty(sum(receive), rows_ND.shape[1])
        _all_to_all(out_RD, rows_ND, receive, send, group)
        return out_RD

    @staticmethod
    def backward(ctx, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        grad_ND = gradients[0].new_empty(sum(ctx.send), gradients[0].shape[1])
        _all_to_all(grad_ND, gradients[0], ctx.send, ctx.receive, ctx.group)
        return grad_ND, None, None, None


def exchange(rows_ND: torch.Tensor, send: list[int], receive: list[int], group: dist.ProcessGroup) -> torch.Tensor:
    """Send consecutive parts of the rows to the ranks of a group. Collective; so is the backward pass.

    Args:
        rows_ND: Rows in the order of the ranks they go to.
        send: Rows for each rank.
        receive: Rows from each rank.
        group: The group.

    Returns:
        The rows received, in the order of the ranks they came from. Differentiable on every rank alike, also where the
        input needs no gradient, so that backward never waits for a rank that has nothing to do.

    Raises:
        ExchangeError: If another rank does not take part within the group's timeout.
    """
    if torch.is_grad_enabled() and not rows_ND.requires_grad:
        rows_ND = rows_ND.detach().requires_grad_()
    return _Exchange.apply(rows_ND, send, receive, group)


def exchange_counts(send: list[torch.Tensor], width: int, group: dist.ProcessGroup) -> list[torch.Tensor]:
    """Tell every rank how many rows it will get for each of its experts. Collective.

    Args:
        send: Counts for each rank, int64; all ranks send equally many to one rank.
        width: Model width, compared between ranks.
        group: The group.

    Returns:
        The counts from each rank.

    Raises:
        ExchangeError: If another rank does not take part within the group's timeout.
        MoeError: If a rank has another width.
    """
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    head = torch.tensor([width], device=send[0].device)
    message = torch.cat([part for counts in send for part in (head, counts)])
    mine = send[rank].numel() + 1
    received = message.new_empty(world * mine)
    _all_to_all(received, message, [mine] * world, [counts.numel() + 1 for counts in send], group)
    parts = received.view(world, mine)
    widths = parts[:, 0].tolist()
    if set(widths) != {width}:
        raise MoeError(
            "model width over the ranks", got=widths, allowed="one width", remedy="build one model everywhere"
        )
    return list(parts[:, 1:])
