"""Mixture of depths: only the tokens with the highest scores pass a layer, the others skip it.

Shapes: T tokens, N kept tokens, D model width.
"""

import dataclasses
import math

import torch
from torch import nn

from moe_kernels.errors import check_choice, check_range
from moe_kernels.layers.modality import INFERENCE, AuxiliaryRouter, prediction_loss
from moe_kernels.layers.routed import flatten_tokens
from moe_kernels.routers import logits_of
from moe_kernels.types import LayerOutput, TokenInfo


class MixtureOfDepths(nn.Module):
    """Puts a router of depth before a layer (Raposo et al. 2024, https://arxiv.org/abs/2404.02258, as used in MoMa).

    The ``ceil(keep_fraction * T)`` real tokens with the highest sigmoid scores pass the layer and their results are
    multiplied by the score; the result of the others is zero, so that with the caller's residual connection they skip
    the layer. Which tokens are kept depends on the whole batch; at inference with ``inference="auxiliary"`` a router
    trained for it decides by each token alone.

    Args:
        layer: A layer that takes ``(x, info)`` and returns a `LayerOutput` without the residual.
        width: Model width D.
        keep_fraction: Share of the tokens that pass, in (0, 1].
        is_gated: Whether results are multiplied by the score; without, the router gets no gradient.
        inference: ``auxiliary`` or ``expert_choice`` (not causal).

    Raises:
        MoeError: If a value is out of range.
    """

    def __init__(
        self,
        layer: nn.Module,
        *,
        width: int,
        keep_fraction: float = 0.25,
        is_gated: bool = True,
        inference: str = "auxiliary",
    ) -> None:
        super().__init__()
        check_range("keep_fraction", keep_fraction, low=1e-9, high=1.0)
        check_choice("inference", inference, INFERENCE)
        self.layer, self.width, self.keep_fraction = layer, width, keep_fraction
        self.is_gated, self.inference = is_gated, inference
        self.weight_1D = nn.Parameter(torch.randn(1, width) / math.sqrt(width))
        self.auxiliary = AuxiliaryRouter(width, 1)

    def _kept(self, score_T: torch.Tensor, is_real_T: torch.Tensor) -> torch.Tensor:
        real_N = is_real_T.nonzero().squeeze(1)
        best = score_T[real_N].topk(math.ceil(self.keep_fraction * real_N.numel())).indices
        return real_N[best].sort().values

    def forward(self, x: torch.Tensor, info: TokenInfo | None = None) -> LayerOutput:
        """Apply the layer to the tokens that pass; states ``(..., D)``."""
        info = info or TokenInfo()
        x_TD = flatten_tokens(x, self.width)
        is_real_T = info.real(x_TD.shape[0], x.device)
        score_T = torch.sigmoid(logits_of(x_TD, self.weight_1D)).squeeze(1)
        if not self.training and self.inference == "auxiliary":
            kept_N = ((self.auxiliary(x_TD).squeeze(1) > 0) & is_real_T).nonzero().squeeze(1)
        else:
            kept_N = self._kept(score_T.detach(), is_real_T)
        out: LayerOutput = self.layer(x_TD[kept_N], info.select(kept_N, x_TD.shape[0]))
        result_ND = out.hidden * score_T[kept_N].to(x.dtype).unsqueeze(1) if self.is_gated else out.hidden
        hidden_TD = torch.zeros_like(x_TD).index_add(0, kept_N, result_ND)
        statistics = dataclasses.replace(out.statistics, token_N=kept_N[out.statistics.token_N])
        return dataclasses.replace(out, hidden=hidden_TD.view(x.shape), statistics=statistics)

    def auxiliary_loss(self, x: torch.Tensor, info: TokenInfo | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Binary cross-entropy of the auxiliary router against what this batch keeps, at least in float32.

        Gradients reach the auxiliary router only.

        Args:
            x: Input states of the layer ``(..., D)``.
            info: Padding.

        Returns:
            The loss, and the share of real tokens predicted rightly; both scalars.
        """
        x_TD = flatten_tokens(x, self.width).detach()
        is_real_T = (info or TokenInfo()).real(x_TD.shape[0], x.device)
        with torch.no_grad():
            is_kept_T = torch.zeros_like(is_real_T)
            is_kept_T[self._kept(logits_of(x_TD, self.weight_1D).squeeze(1), is_real_T)] = True
        return prediction_loss(self.auxiliary(x_TD).squeeze(1)[is_real_T], is_kept_T[is_real_T])
