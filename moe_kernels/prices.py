"""Prices of a balanced assignment, averaged over updates, for choosing experts one token at a time.

Shapes: E experts.
"""

import torch
import torch.distributed as dist
from torch import nn

_DECAY = 0.9


class RunningPrices(nn.Module):
    """Exponential moving average of the optimal prices of an assignment.

    In a balanced assignment each token has the expert with the highest score minus price (`solve_assignment`). Scores
    alone forget the prices, so the nearest expert of a token is often one that training kept for others: few experts
    then take most tokens. With the prices of the training batches a single token's choice is about as balanced as they
    were, and still depends on that token alone.

    `observe` may be called again for the same micro-batch, as activation checkpointing does: it counts once. Call
    `next_micro_batch` after each backward and `end_update` after each update. ``price_E`` is in ``state_dict``; it is
    zero until the first update ends.

    Args:
        num_experts: Experts of the layer.
        group: Process group over which prices are averaged; ``None`` for this process alone.
    """

    price_E: torch.Tensor
    sum_E: torch.Tensor
    """Prices times tokens over the micro-batches of this update, and in the last place the tokens."""
    current_E: torch.Tensor

    def __init__(self, num_experts: int, group: dist.ProcessGroup | None = None) -> None:
        super().__init__()
        self.group = group
        self.register_buffer("price_E", torch.zeros(num_experts, dtype=torch.float32))
        for name in ("sum_E", "current_E"):
            self.register_buffer(name, torch.zeros(num_experts + 1, dtype=torch.float64), persistent=False)

    @torch.no_grad()
    def observe(self, price_E: torch.Tensor, num_tokens: int) -> None:
        """Take the prices of a micro-batch's assignment; they count relative to their mean.

        Args:
            price_E: Optimal prices ``(E,)``, any float dtype and device.
            num_tokens: Tokens that were assigned; prices of none, or that are not finite, do not count.
        """
        price_E = price_E.to(self.sum_E)
        centred_E = price_E - price_E.mean()
        weight = num_tokens * torch.isfinite(centred_E).all()
        self.current_E[:-1] = torch.nan_to_num(centred_E, posinf=0.0, neginf=0.0) * weight
        self.current_E[-1] = weight

    def next_micro_batch(self) -> None:
        """Close the micro-batch: what was observed last stays in the sum."""
        self.sum_E += self.current_E
        self.current_E.zero_()

    @torch.no_grad()
    def end_update(self) -> None:
        """Move the average towards this update's prices. Collective: all ranks of the group must call."""
        if self.group is not None:
            dist.all_reduce(self.sum_E, group=self.group)
        weight = self.sum_E[-1]
        mean_E = (self.sum_E[:-1] / weight.clamp(min=1)).to(self.price_E)
        self.price_E.lerp_(mean_E, (1 - _DECAY) * (weight > 0).to(self.price_E))
        self.sum_E.zero_()
