"""Modality-aware layers (MoMa): experts in groups by modality, expert choice inside a group.

Shapes: T tokens, D model width, M modalities, E experts of all groups, G experts of one group, N routed copies.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

from moe_kernels.errors import MoeError, check_choice, check_range
from moe_kernels.experts import SwigluExperts
from moe_kernels.layers.routed import RoutedLayer
from moe_kernels.routers import logits_of
from moe_kernels.selection import choose_in_groups
from moe_kernels.types import Routing, TokenInfo

INFERENCE = ("expert_choice", "auxiliary")


class AuxiliaryRouter(nn.Module):
    """Predicts from a token alone whether each expert would choose it: ``W2 silu(W1 x)`` with hidden width D / 2.

    Args:
        width: Model width D.
        num_experts: E.
    """

    def __init__(self, width: int, num_experts: int) -> None:
        super().__init__()
        self.inner = nn.Linear(width, max(1, width // 2))
        self.outer = nn.Linear(max(1, width // 2), num_experts)

    def forward(self, x_TD: torch.Tensor) -> torch.Tensor:
        """Logits ``(T, E)`` of being chosen."""
        return self.outer(functional.silu(self.inner(x_TD)))


def prediction_loss(logits_N: torch.Tensor, is_chosen_N: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Binary cross-entropy of predictions and the share of right ones, threshold 0.5.

    Args:
        logits_N: Logits ``(N,)`` in any floating dtype; the loss is computed at least in float32.
        is_chosen_N: What was to be predicted ``(N,)``, boolean.

    Returns:
        Mean loss and share, scalars; 0 and 1 where there is nothing to predict.
    """
    logits_N = logits_N.to(torch.promote_types(logits_N.dtype, torch.float32))
    if not is_chosen_N.numel():
        return logits_N.sum(), torch.ones_like(logits_N.sum())
    loss = functional.binary_cross_entropy_with_logits(logits_N, is_chosen_N.to(logits_N.dtype))
    return loss, ((logits_N.detach() > 0) == is_chosen_N).to(logits_N.dtype).mean()


class ModalityRouter(nn.Module):
    """Expert choice with sigmoid scores inside each modality's group (Lin et al. 2024, https://arxiv.org/abs/2407.21770).

    An expert of modality m takes ``max(1, floor(T_m / G_m))`` of that modality's ``T_m`` tokens, so a token meets one
    expert on average. The score of a token for an expert depends on nothing else; which tokens are chosen, on the
    batch. At inference with ``inference="auxiliary"`` a token goes to the experts of its group whose auxiliary router
    says so, which depends on the token alone.

    An expert that is alone in its group takes all of its tokens with weight 1, whatever the scores: groups of one
    each are dense networks chosen by modality.

    Args:
        width: Model width D.
        group_sizes: Experts of each modality, in the order of modality ids.
        is_noisy: Whether scores get logistic noise (Gumbel-sigmoid) in training mode.
        inference: ``expert_choice`` (not causal) or ``auxiliary``.

    Raises:
        MoeError: If there is no group, a group is empty or the mode unknown.
    """

    def __init__(
        self, width: int, group_sizes: Sequence[int], *, is_noisy: bool = False, inference: str = "auxiliary"
    ) -> None:
        super().__init__()
        check_range("number of modalities", len(group_sizes), low=1)
        check_range("experts of a modality", min(group_sizes), low=1)
        check_choice("inference", inference, INFERENCE)
        self.group_sizes, self.is_noisy, self.inference = tuple(group_sizes), is_noisy, inference
        num_experts = sum(group_sizes)
        self.weight_ED = nn.Parameter(torch.randn(num_experts, width) / math.sqrt(width))
        self.auxiliary = AuxiliaryRouter(width, num_experts)
        modality_E = torch.repeat_interleave(torch.arange(len(group_sizes)), torch.tensor(self.group_sizes))
        self.register_buffer("modality_E", modality_E, persistent=False)
        is_alone_E = torch.tensor(self.group_sizes)[modality_E] == 1
        self.register_buffer("is_alone_E", is_alone_E, persistent=False)
        self.has_choice = max(self.group_sizes) > 1

    modality_E: torch.Tensor
    is_alone_E: torch.Tensor

    def _chosen(self, score_TE: torch.Tensor, modality_T: torch.Tensor, is_real_T: torch.Tensor) -> torch.Tensor:
        """Membership ``(T, E)`` by expert choice."""
        group_T = torch.where(is_real_T, modality_T, -1)
        size_M = torch.tensor(self.group_sizes, device=group_T.device)
        count_M = (group_T.unsqueeze(1) == torch.arange(len(size_M), device=group_T.device)).sum(0)
        capacity_M = torch.where(count_M > 0, (count_M // size_M).clamp(min=1), 0)
        return choose_in_groups(score_TE, group_T, self.modality_E, capacity_M[self.modality_E])

    def own_group(self, modality_T: torch.Tensor, is_real_T: torch.Tensor) -> torch.Tensor:
        """Pairs ``(T, E)`` of a real token and an expert of its modality.

        Args:
            modality_T: Modality ids.
            is_real_T: Padding mask.

        Returns:
            Boolean ``(T, E)``.
        """
        return (modality_T.unsqueeze(1) == self.modality_E) & is_real_T.unsqueeze(1)

    def forward(self, x_TD: torch.Tensor, info: TokenInfo) -> Routing:
        """Route by ``info.modality_T`` and scores."""
        num_tokens = x_TD.shape[0]
        modality_T = info.need("modality_T", num_tokens, len(self.group_sizes)).to(x_TD.device)
        is_real_T = info.real(num_tokens, x_TD.device)
        logits_TE = logits_of(x_TD, self.weight_ED)
        if self.training and self.is_noisy:
            uniform_TE = torch.rand_like(logits_TE).clamp(1e-6, 1 - 1e-6)
            logits_TE = logits_TE + torch.logit(uniform_TE)
        score_TE = torch.sigmoid(logits_TE).masked_fill(self.is_alone_E, 1.0)
        if not self.training and self.inference == "auxiliary":
            is_taken_TE = (self.auxiliary(x_TD) > 0) | self.is_alone_E
            is_chosen_TE = is_taken_TE & self.own_group(modality_T, is_real_T)
        else:
            is_chosen_TE = self._chosen(score_TE.detach(), modality_T, is_real_T)
        token_N, expert_N = is_chosen_TE.nonzero(as_tuple=True)
        return Routing(
            token_N=token_N,
            expert_N=expert_N,
            weight_N=score_TE[token_N, expert_N],
            num_tokens=num_tokens,
            num_experts=len(self.modality_E),
            is_real_T=is_real_T,
        )

    def auxiliary_loss(self, x_TD: torch.Tensor, info: TokenInfo) -> tuple[torch.Tensor, torch.Tensor]:
        """Binary cross-entropy of the auxiliary routers against expert choice on this batch, at least in float32.

        Gradients reach the auxiliary routers only. Experts that are alone in their group leave nothing to predict.

        Args:
            x_TD: Input states of the layer ``(T, D)``.
            info: With ``modality_T``.

        Returns:
            The loss, and the share of (token, expert) pairs of one modality predicted rightly; both scalars.
        """
        x_TD = x_TD.detach()
        modality_T = info.need("modality_T", x_TD.shape[0], len(self.group_sizes)).to(x_TD.device)
        is_real_T = info.real(x_TD.shape[0], x_TD.device)
        with torch.no_grad():
            target_TE = self._chosen(torch.sigmoid(logits_of(x_TD, self.weight_ED)), modality_T, is_real_T)
        pairs = self.own_group(modality_T, is_real_T) & ~self.is_alone_E
        return prediction_loss(self.auxiliary(x_TD)[pairs], target_TE[pairs])


class ModalityLayer(RoutedLayer):
    """Expert groups by modality. A token may meet no expert or several; its result is the sum of score times expert.

    Args:
        router: A `ModalityRouter`.
        experts: As many experts as all groups together.
        width: Model width D.
    """

    router: ModalityRouter

    def __init__(self, router: ModalityRouter, experts: nn.Module, *, width: int) -> None:
        super().__init__(router, experts, width=width)

    @torch.no_grad()
    def upcycle(self, seeds: Mapping[int, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]) -> None:
        """Start every expert of a modality from that modality's dense feed-forward network.

        Args:
            seeds: Per modality id ``w1_DF``, ``w3_DF``, ``w2_FD``.

        Raises:
            MoeError: If a modality is missing or the experts are not a `SwigluExperts`.
        """
        if not isinstance(self.experts, SwigluExperts) or set(seeds) != set(range(len(self.router.group_sizes))):
            got = f"{type(self.experts).__name__} with seeds for {sorted(seeds)}"
            remedy = "give one network per modality"
            raise MoeError("upcycling", got=got, allowed="SwigluExperts and a seed for each modality", remedy=remedy)
        for expert, modality in enumerate(self.router.modality_E.tolist()):
            stacks = (self.experts.w1_EDF, self.experts.w3_EDF, self.experts.w2_EFD)
            for stack, seed in zip(stacks, seeds[modality], strict=True):
                stack[expert].copy_(seed)


@dataclass(frozen=True, kw_only=True)
class ModalityConfig:
    """A modality-aware layer of SwiGLU experts."""

    width: int
    """Model width D."""
    hidden_width: int
    """Feed-forward width F of each expert."""
    group_sizes: tuple[int, ...]
    """Experts of each modality, for instance ``(4, 4)`` for text and images."""
    is_noisy: bool = False
    """Gumbel-sigmoid noise on the scores in training, as for upcycled models."""
    inference: str = "auxiliary"
    """``auxiliary`` (causal, after the auxiliary routers are trained) or ``expert_choice``."""
    backend: str = "auto"
    """Backend of the experts."""

    def build(self) -> ModalityLayer:
        """Build the layer.

        Returns:
            The layer, in training mode.
        """
        router = ModalityRouter(self.width, self.group_sizes, is_noisy=self.is_noisy, inference=self.inference)
        experts = SwigluExperts(sum(self.group_sizes), self.width, self.hidden_width, backend=self.backend)
        return ModalityLayer(router, experts, width=self.width)
