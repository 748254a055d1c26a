"""BASE layers: balanced assignment in training, the best expert at inference, no auxiliary loss, no dropped token.

Shapes: T tokens, D model width, E experts.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn

from moe_kernels.dispatch import run_experts
from moe_kernels.exchange import exchange, exchange_counts
from moe_kernels.experts import ExpertList, ResidualFfnStack
from moe_kernels.layers.routed import flatten_tokens
from moe_kernels.routers import BalancedRouter
from moe_kernels.types import LayerOutput, Routing, TokenInfo, statistics_of


class BaseLayer(nn.Module):
    """``out = h + sigmoid(h . w_a) * f_a(h)`` with a the expert of the token (https://arxiv.org/abs/2103.16716).

    The residual connection is inside. In training mode experts get equally many tokens of this process's batch; at
    inference each token goes to its best expert, whatever the rest of the batch holds.

    Args:
        router: A `BalancedRouter`.
        experts: Experts that return the change they make, as `ResidualFfnStack` does.
        width: Model width D.
        shuffle_group: Group over which tokens are shuffled in training mode before they are assigned, so that the
            balance holds over tokens of all ranks rather than those of one document; ``None`` for no shuffle.
    """

    def __init__(
        self,
        router: BalancedRouter,
        experts: nn.Module,
        *,
        width: int,
        shuffle_group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        self.router, self.experts, self.width, self.shuffle_group = router, experts, width, shuffle_group

    def forward(self, x: torch.Tensor, info: TokenInfo | None = None) -> LayerOutput:
        """Apply the layer to states ``(..., D)``; padding passes unchanged."""
        x_TD = flatten_tokens(x, self.width)
        is_real_T = (info or TokenInfo()).real(x_TD.shape[0], x.device)
        if self.shuffle_group is None or not self.training:
            change_TD, routing = self._change(x_TD, is_real_T)
            return LayerOutput(hidden=(x_TD + change_TD).view(x.shape), statistics=statistics_of(routing))
        real_N = is_real_T.nonzero().squeeze(1)
        order_N = real_N[torch.randperm(real_N.numel()).to(real_N.device)]
        send = [part.numel() for part in order_N.tensor_split(dist.get_world_size(self.shuffle_group))]
        counts = exchange_counts([order_N.new_tensor([count]) for count in send], self.width, self.shuffle_group)
        receive = [int(count) for count in counts]
        mixed_TD = exchange(x_TD[order_N], send, receive, self.shuffle_group)
        change_TD, routing = self._change(mixed_TD, torch.ones_like(mixed_TD[:, 0], dtype=torch.bool))
        change_ND = exchange(change_TD, receive, send, self.shuffle_group)
        hidden_TD = x_TD.index_add(0, order_N, change_ND)
        return LayerOutput(hidden=hidden_TD.view(x.shape), statistics=statistics_of(routing))

    def _change(self, x_TD: torch.Tensor, is_real_T: torch.Tensor) -> tuple[torch.Tensor, Routing]:
        routing: Routing = self.router(x_TD, TokenInfo(is_real_T=is_real_T))
        return run_experts(x_TD, routing, self.experts), routing


@dataclass(frozen=True, kw_only=True)
class BaseConfig:
    """A BASE layer with stacks of residual feed-forward networks as experts."""

    width: int
    """Model width D."""
    hidden_width: int
    """Feed-forward width F of each sublayer."""
    num_experts: int
    """Experts E."""
    num_sublayers: int = 1
    """Feed-forward networks in each expert."""
    assignment: str = "exact"
    """How tokens are assigned in training: ``exact``, or ``auction`` for parity with the published code."""
    is_priced: bool = True
    """Whether running prices of the training keep the experts balanced at inference, see `BalancedRouter`."""

    def build(self) -> BaseLayer:
        """Build the layer; it starts as the identity.

        Returns:
            The layer, in training mode.
        """
        stacks = (ResidualFfnStack(self.width, self.hidden_width, self.num_sublayers) for _ in range(self.num_experts))
        router = BalancedRouter(self.width, self.num_experts, method=self.assignment, is_priced=self.is_priced)
        return BaseLayer(router, ExpertList(stacks), width=self.width)


def base_layer_positions(num_layers: int, num_base_layers: int) -> list[int]:
    """After which layers of a transformer BASE layers stand, as the paper places them.

    Args:
        num_layers: Layers of the transformer.
        num_base_layers: BASE layers to place.

    Returns:
        Number of transformer layers before each BASE layer: ``floor(i * L / (N + 1))`` for i from 1 to N.
    """
    return [index * num_layers // (num_base_layers + 1) for index in range(1, num_base_layers + 1)]
