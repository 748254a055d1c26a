"""Router, dispatch, experts, combine in a row: the frame of the layers, and the token-choice layers themselves.

Shapes: B sequences, S positions, T = B * S tokens, D model width, E experts.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn

from moe_kernels.dispatch import limit_capacity, run_experts
from moe_kernels.errors import MoeError, check_choice
from moe_kernels.experts import SwigluExperts, SwigluFfn
from moe_kernels.losses import BalanceBuffer, load_balancing_loss, z_loss
from moe_kernels.routers import ExpertChoiceRouter, HashRouter, SwitchRouter, TopKRouter
from moe_kernels.types import LayerOutput, Routing, TokenInfo, statistics_of

ROUTERS = ("top_k", "switch", "expert_choice", "hash")


class Router(Protocol):
    """Any module that maps token states ``(T, D)`` and what is known of the tokens to a `Routing`."""

    def __call__(self, x_TD: torch.Tensor, info: TokenInfo) -> Routing:
        """Route the tokens."""
        ...


class Experts(Protocol):
    """Any module that maps rows ``(N, D)`` sorted by expert, with their counts ``(E,)``, to rows in the same order."""

    def __call__(self, rows_ND: torch.Tensor, counts_E: torch.Tensor) -> torch.Tensor:
        """Apply the experts."""
        ...


def flatten_tokens(x: torch.Tensor, width: int) -> torch.Tensor:
    """View states ``(..., D)`` as ``(T, D)``.

    Args:
        x: States.
        width: Expected D.

    Returns:
        ``(T, D)``.

    Raises:
        MoeError: If the last axis is not ``width`` or the dtype is not floating.
    """
    if x.dim() < 2 or x.shape[-1] != width or not x.is_floating_point():
        got = f"{x.dtype} of {tuple(x.shape)}"
        raise MoeError(
            "input of the layer", got=got, allowed=f"floating (..., {width})", remedy="check the model width"
        )
    return x.reshape(-1, width)


class RoutedLayer(nn.Module):
    """A feed-forward layer of experts; the residual connection around it is the caller's.

    Args:
        router: The router.
        experts: The experts; wrap them in `ExpertParallelExperts` to spread them over processes.
        width: Model width D.
        capacity_factor: See `limit_capacity`; ``None`` drops nothing.
        shared: A network that every token passes as well, or ``None``.
        balance: Loads over the global batch for the balancing loss; ``None`` for this batch alone.
    """

    def __init__(
        self,
        router: nn.Module,
        experts: nn.Module,
        *,
        width: int,
        capacity_factor: float | None = None,
        shared: nn.Module | None = None,
        balance: BalanceBuffer | None = None,
    ) -> None:
        super().__init__()
        self.router, self.experts, self.shared, self.balance = router, experts, shared, balance
        self.width, self.capacity_factor = width, capacity_factor

    def forward(self, x: torch.Tensor, info: TokenInfo | None = None) -> LayerOutput:
        """Apply the layer.

        Args:
            x: Token states ``(..., D)``.
            info: Padding, labels, ids of the tokens, in the order of ``x`` with its leading axes flattened.

        Returns:
            The result in the shape of ``x``; losses ``load_balance`` and ``z`` where the router has logits.
        """
        info = info or TokenInfo()
        x_TD = flatten_tokens(x, self.width)
        wanted: Routing = self.router(x_TD, info)
        routing = limit_capacity(wanted, self.capacity_factor)
        y_TD = run_experts(x_TD, routing, self.experts)
        if self.shared is not None:
            y_TD = y_TD + self.shared(x_TD)
        return LayerOutput(hidden=y_TD.view(x.shape), statistics=statistics_of(routing), losses=self._losses(wanted))

    def _losses(self, routing: Routing) -> dict[str, torch.Tensor]:
        if routing.logits_TE is None:
            return {}
        fraction_E = None
        if self.balance is not None and self.training:
            fraction_E = self.balance.observe(routing.expert_counts())
        return {"load_balance": load_balancing_loss(routing, fraction_E), "z": z_loss(routing)}


@dataclass(frozen=True, kw_only=True)
class TopKConfig:
    """A layer of SwiGLU experts with one of the routers that need no labels of domain or modality."""

    width: int
    """Model width D."""
    hidden_width: int
    """Feed-forward width F of each expert."""
    num_experts: int
    """Experts E."""
    router: str = "top_k"
    """``top_k``, ``switch``, ``expert_choice`` or ``hash``."""
    experts_per_token: int = 2
    """Experts per token K; for ``expert_choice`` the mean; 1 for ``switch`` and ``hash``."""
    score: str = "softmax"
    """``softmax`` or ``sigmoid`` (``top_k`` and ``expert_choice``)."""
    capacity_factor: float | None = None
    """Rows per expert over the mean load; ``None`` drops no token."""
    shared_hidden_width: int = 0
    """Feed-forward width of a network that every token passes as well; 0 for none."""
    is_globally_balanced: bool = False
    """Whether the balancing loss looks at the loads of all micro-batches of an update, see `BalanceBuffer`."""
    backend: str = "auto"
    """Backend of the experts: ``auto``, ``loop``, ``grouped_mm`` or ``triton``."""

    def build(self) -> RoutedLayer:
        """Build the layer.

        Returns:
            The layer, in training mode.

        Raises:
            MoeError: If a value is out of range.
        """
        check_choice("router", self.router, ROUTERS)
        experts = SwigluExperts(self.num_experts, self.width, self.hidden_width, backend=self.backend)
        return RoutedLayer(
            self._router(),
            experts,
            width=self.width,
            capacity_factor=self.capacity_factor,
            shared=SwigluFfn(self.width, self.shared_hidden_width) if self.shared_hidden_width else None,
            balance=BalanceBuffer(self.num_experts) if self.is_globally_balanced else None,
        )

    def _router(self) -> nn.Module:
        if self.router == "switch":
            return SwitchRouter(self.width, self.num_experts)
        if self.router == "hash":
            return HashRouter(self.num_experts)
        if self.router == "expert_choice":
            factor = float(self.experts_per_token)
            return ExpertChoiceRouter(self.width, self.num_experts, capacity_factor=factor, score=self.score)
        backend = "triton" if self.backend == "triton" else "auto"
        return TopKRouter(self.width, self.num_experts, self.experts_per_token, score=self.score, backend=backend)
