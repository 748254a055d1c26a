"""What passes between the seams: router -> `Routing` -> dispatch -> `Dispatch` -> experts -> combine -> `LayerOutput`.

Shapes: T tokens, E experts, N routed copies of tokens, D model width.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from moe_kernels.errors import MoeError


@dataclass(frozen=True, kw_only=True)
class TokenInfo:
    """What a router may know of the tokens beside their states; every field has one entry per token, in order."""

    is_real_T: torch.Tensor | None = None
    """False for padding ``(T,)``: such tokens go to no expert and count in no loss."""
    domain_T: torch.Tensor | None = None
    """Domain id ``(T,)``, integers."""
    modality_T: torch.Tensor | None = None
    """Modality id ``(T,)``, integers."""
    token_id_T: torch.Tensor | None = None
    """Vocabulary id ``(T,)``, integers."""

    def need(self, name: str, num_tokens: int, high: int) -> torch.Tensor:
        """Return a field of ids after checking it.

        Args:
            name: ``domain_T``, ``modality_T`` or ``token_id_T``.
            num_tokens: Expected length.
            high: Ids must be below this.

        Returns:
            The ids ``(T,)``; 0 for padding, whatever stood there.

        Raises:
            MoeError: If the field is missing, has another length, or holds ids outside ``[0, high)``.
        """
        ids_T = getattr(self, name)
        if ids_T is None or ids_T.numel() != num_tokens or ids_T.is_floating_point():
            got = None if ids_T is None else f"{ids_T.dtype} of {tuple(ids_T.shape)}"
            raise MoeError(name, got=got, allowed=f"{num_tokens} integers", remedy=f"pass TokenInfo({name}=...)")
        ids_T = torch.where(self.real(num_tokens, ids_T.device), ids_T.reshape(-1).long(), 0)
        if num_tokens and (int(ids_T.min()) < 0 or int(ids_T.max()) >= high):
            got = f"ids from {int(ids_T.min())} to {int(ids_T.max())}"
            raise MoeError(name, got=got, allowed=f"0 to {high - 1}", remedy="add experts or correct the ids")
        return ids_T

    def select(self, index_N: torch.Tensor, num_tokens: int) -> "TokenInfo":
        """The same for some of the tokens.

        Args:
            index_N: Which tokens ``(N,)``.
            num_tokens: Tokens there are.

        Returns:
            Fields with one entry per index.

        Raises:
            MoeError: If the mask has another length than ``num_tokens``.
        """
        fields = {name: value for name, value in vars(self).items() if value is not None and name != "is_real_T"}
        picked = {name: value.reshape(-1)[index_N.to(value.device)] for name, value in fields.items()}
        return TokenInfo(is_real_T=self.real(num_tokens, index_N.device)[index_N], **picked)

    def real(self, num_tokens: int, device: torch.device) -> torch.Tensor:
        """The padding mask ``(T,)``, all true where none was given.

        Args:
            num_tokens: Expected length.
            device: Device of a new mask.

        Returns:
            Boolean mask ``(T,)``.

        Raises:
            MoeError: If the mask has another length.
        """
        if self.is_real_T is None:
            return torch.ones(num_tokens, dtype=torch.bool, device=device)
        if self.is_real_T.numel() != num_tokens:
            got = tuple(self.is_real_T.shape)
            raise MoeError("is_real_T", got=got, allowed=f"({num_tokens},)", remedy="one entry per token")
        return self.is_real_T.reshape(-1).to(device, torch.bool)


@dataclass(frozen=True, kw_only=True)
class ExpertOrder:
    """Routed copies sorted by expert, those of one expert in the order of the routing."""

    copy_N: torch.Tensor
    """The copy in each row ``(N,)``, int64."""
    row_N: torch.Tensor
    """The row of each copy ``(N,)``, int64."""
    counts_E: torch.Tensor
    """Rows per expert ``(E,)``, int64."""


@dataclass(frozen=True, kw_only=True)
class Routing:
    """Which tokens go to which experts, and with what weight each result comes back. One entry per routed copy."""

    token_N: torch.Tensor
    """Index of the token ``(N,)``, int64."""
    expert_N: torch.Tensor
    """Id of the expert ``(N,)``, int64."""
    weight_N: torch.Tensor
    """Combine weight ``(N,)``; carries the gradient of the router."""
    num_tokens: int
    num_experts: int
    is_real_T: torch.Tensor
    """False for padding ``(T,)``."""
    logits_TE: torch.Tensor | None = None
    """Router logits ``(T, E)`` with gradient, for auxiliary losses; ``None`` for routers without parameters."""
    probs_TE: torch.Tensor | None = None
    """Normalised scores ``(T, E)`` with gradient, each row summing to 1; ``None`` for routers without parameters."""
    num_dropped: int = 0
    """Routed copies that a capacity turned away."""
    by_expert: ExpertOrder | None = None
    """The order by expert, where the router found it on its way; whoever drops copies must drop this too."""

    def expert_counts(self) -> torch.Tensor:
        """Routed copies per expert ``(E,)``, int64."""
        return torch.bincount(self.expert_N, minlength=self.num_experts)


@dataclass(frozen=True, kw_only=True)
class TokenOrder:
    """The routed copies of each token, in the order of the routing: what sums over a token's copies walk along."""

    copy_N: torch.Tensor
    """Routed copies sorted by token ``(N,)``, int64."""
    start_T1: torch.Tensor
    """Where each token's copies start in it, and the end of all ``(T + 1,)``, int64."""


@dataclass(frozen=True, kw_only=True)
class Dispatch:
    """Token states in the order of their experts, and what is needed to bring the results back."""

    rows_ND: torch.Tensor
    """Copies of token states ``(N, D)``, sorted by expert, within an expert in the order of the routing."""
    counts_E: torch.Tensor
    """Rows per expert ``(E,)``, int64."""
    token_N: torch.Tensor
    """Token of each routed copy in the order of the routing ``(N,)``."""
    weight_N: torch.Tensor
    """Combine weight of each routed copy in that order ``(N,)``."""
    row_N: torch.Tensor
    """Row of each routed copy in the order of the routing ``(N,)``: results are summed in that order, so that they do
    not depend on how experts are numbered."""
    num_tokens: int
    by_token: TokenOrder | None = None
    """The copies of each token, where Triton needs them."""


@dataclass(frozen=True, kw_only=True)
class RoutingStatistics:
    """How a layer routed one batch; nothing here carries a gradient."""

    counts_E: torch.Tensor
    """Routed copies per expert ``(E,)``, int64."""
    num_tokens: int
    """Tokens without padding."""
    num_dropped: int
    """Routed copies turned away by a capacity."""
    num_unrouted: int
    """Real tokens that reached no expert."""
    token_N: torch.Tensor
    """Token of each routed copy ``(N,)``, int64, numbered as the layer was given them."""
    expert_N: torch.Tensor
    """Expert of each routed copy ``(N,)``, int64."""

    @property
    def max_over_mean_load(self) -> float:
        """Load of the fullest expert over the mean load; 1.0 = balanced, 0 without tokens."""
        total = int(self.counts_E.sum())
        return float(self.counts_E.max()) * self.counts_E.numel() / total if total else 0.0

    @property
    def dropped_fraction(self) -> float:
        """Share of the routed copies that a capacity turned away, in [0, 1]."""
        wanted = int(self.counts_E.sum()) + self.num_dropped
        return self.num_dropped / wanted if wanted else 0.0

    @property
    def load_entropy(self) -> float:
        """Entropy of the load over experts relative to the uniform load, in [0, 1]; 1 with a single expert."""
        if self.counts_E.numel() == 1:
            return 1.0
        share_E = self.counts_E.double() / max(1, int(self.counts_E.sum()))
        return float(torch.special.entr(share_E).sum() / torch.log(torch.tensor(float(self.counts_E.numel()))))


@dataclass(frozen=True, kw_only=True)
class LayerOutput:
    """All that one forward pass of an expert layer produced."""

    hidden: torch.Tensor
    """Result, in the shape of the input."""
    statistics: RoutingStatistics
    losses: Mapping[str, torch.Tensor] = field(default_factory=dict)
    """Auxiliary losses by name, scalars with gradient, not yet multiplied by their weights."""


def statistics_of(routing: Routing) -> RoutingStatistics:
    """Summarise a routing.

    Args:
        routing: What a router returned, after any capacity.

    Returns:
        Its statistics.
    """
    is_routed_T = torch.zeros(routing.num_tokens, dtype=torch.bool, device=routing.token_N.device)
    is_routed_T[routing.token_N] = True
    return RoutingStatistics(
        counts_E=routing.expert_counts(),
        num_tokens=int(routing.is_real_T.sum()),
        num_dropped=routing.num_dropped,
        num_unrouted=int((routing.is_real_T & ~is_routed_T).sum()),
        token_N=routing.token_N,
        expert_N=routing.expert_N,
    )
