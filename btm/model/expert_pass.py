"""What one forward pass tells the expert layers of a model, and what they tell back.

One :class:`ExpertPass` goes with one call of the model, as the keyword argument :data:`EXPERTS`; the blocks hand it to
their expert layers. Nothing about the tokens of a pass is kept in modules.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from btm.errors import BtmError
from moe_kernels import LayerOutput, RoutingStatistics, TokenInfo

EXPERTS = "btm_experts"
"""Keyword argument of a model's forward that carries the pass."""


class ExpertPassError(BtmError):
    """A sparse model was called in a way that its expert layers cannot work with."""


@dataclass(frozen=True, slots=True)
class LayerReport:
    """What one expert layer did in a pass."""

    statistics: RoutingStatistics
    losses: Mapping[str, torch.Tensor]
    """Auxiliary losses by name, scalars with gradient, without their weights."""


@dataclass
class ExpertPass:
    """Labels of the tokens of one forward pass of B sequences of T tokens, and the reports of the layers.

    Attributes:
        domain: Domain id of each sequence, int64 [B]; needed by DEMix layers.
        is_real: False for padding, bool [B, T]; None where there is none.
        reports: Block number -> report, filled while the model runs. Where a block runs again in the backward pass
            (activation checkpointing), the first report stays: it is the one that the loss was built from.
    """

    domain: torch.Tensor | None = None
    is_real: torch.Tensor | None = None
    reports: dict[int, LayerReport] = field(default_factory=dict)
    _info: TokenInfo | None = None
    _without_gradient: set[int] = field(default_factory=set)

    def begin(self, token_ids: torch.Tensor, modality_starts: Sequence[int] | None = None) -> None:
        """Take the tokens of the pass; the model calls this.

        Args:
            token_ids: int64 [B, T].
            modality_starts: First token id of each modality after the first; None where layers ask for no modality.

        Raises:
            ExpertPassError: If the pass was used before, or labels and tokens differ in shape.
        """
        if self._info is not None:
            raise ExpertPassError("an ExpertPass serves one forward pass; make a new one for each")
        self._check(token_ids)
        batch, length = token_ids.shape
        modality = None
        if modality_starts is not None:
            borders = torch.tensor(list(modality_starts), dtype=torch.int64, device=token_ids.device)
            modality = torch.bucketize(token_ids.reshape(-1).contiguous(), borders, right=True)
        domain = None if self.domain is None else self.domain.to(token_ids.device)
        self._info = TokenInfo(
            is_real_T=None if self.is_real is None else self.is_real.reshape(-1),
            domain_T=None if domain is None else domain[:, None].expand(batch, length).reshape(-1),
            modality_T=modality,
            token_id_T=token_ids.reshape(-1),
        )

    @property
    def info(self) -> TokenInfo:
        """Labels of the B x T tokens, one after the other.

        Raises:
            ExpertPassError: Before the model has taken its tokens.
        """
        if self._info is None:
            raise ExpertPassError("expert layers ran outside of their model; call the model itself")
        return self._info

    def record(self, block: int, output: LayerOutput) -> None:
        """Take the report of the layer of ``block``.

        Raises:
            ExpertPassError: Where reentrant activation checkpointing would cut the auxiliary losses off.
        """
        if block in self._without_gradient and torch.is_grad_enabled():
            raise ExpertPassError(
                "reentrant activation checkpointing drops the gradient of auxiliary losses; use "
                "gradient_checkpointing_enable({'use_reentrant': False})"
            )
        if not torch.is_grad_enabled():
            self._without_gradient.add(block)
        self.reports.setdefault(block, LayerReport(output.statistics, output.losses))

    def loss(self, weights: Mapping[str, float]) -> torch.Tensor | None:
        """Weighted sum of the auxiliary losses of all layers; None where there is nothing to add.

        Args:
            weights: Name of a loss -> its weight; losses without a weight are left out.
        """
        parts = [
            weights[name] * loss
            for _, report in sorted(self.reports.items())
            for name, loss in report.losses.items()
            if weights.get(name)
        ]
        return torch.stack(parts).sum() if parts else None

    def _check(self, token_ids: torch.Tensor) -> None:
        batch = token_ids.shape[0]
        if self.domain is not None and self.domain.shape != (batch,):
            raise ExpertPassError(
                f"domain must hold one id for each of {batch} sequences, got {list(self.domain.shape)}"
            )
        if self.is_real is not None and self.is_real.shape != token_ids.shape:
            raise ExpertPassError(f"is_real must be {list(token_ids.shape)}, got {list(self.is_real.shape)}")
