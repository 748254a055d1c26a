"""Routers: from token states to a `Routing`. Training and inference differ by ``self.training`` only.

Shapes: T tokens, E experts, K experts per token, N routed copies, C capacity, D model width.
"""

import math

import torch
from torch import nn

from moe_kernels.assignment import METHODS, assign_balanced, solve_assignment
from moe_kernels.errors import check_choice, check_range
from moe_kernels.prices import RunningPrices
from moe_kernels.selection import top_experts, top_tokens, weighted_experts
from moe_kernels.triton_kernels.routing import route_top_k, takes
from moe_kernels.triton_kernels.runtime import BACKENDS, use_triton
from moe_kernels.types import Routing, TokenInfo

SCORES = ("softmax", "sigmoid")
_CENTROID_SCALE = 0.1
"""Centroids of BASE are this times their parameter, so that they start small and Adam turns them slowly."""


def _normalised(scores_TE: torch.Tensor) -> torch.Tensor:
    return scores_TE / scores_TE.sum(-1, keepdim=True).clamp(min=torch.finfo(scores_TE.dtype).tiny)


def _scores(logits_TE: torch.Tensor, kind: str) -> torch.Tensor:
    return torch.softmax(logits_TE, dim=-1) if kind == "softmax" else torch.sigmoid(logits_TE)


def logits_of(x_TD: torch.Tensor, weight_ED: torch.Tensor) -> torch.Tensor:
    """Router logits ``(T, E)``, at least in float32 whatever the dtype of the model."""
    dtype = torch.promote_types(torch.promote_types(x_TD.dtype, weight_ED.dtype), torch.float32)
    return x_TD.to(dtype) @ weight_ED.to(dtype).t()


class TopKRouter(nn.Module):
    """Each token takes the K experts with the highest scores (Shazeer et al. 2017, https://arxiv.org/abs/1701.06538).

    Args:
        width: Model width D.
        num_experts: E.
        experts_per_token: K, 1 to E.
        score: ``softmax`` over the experts, or ``sigmoid`` of each.
        is_renormalised: Whether the K weights of a token are scaled to sum to 1.
        backend: ``torch``, ``triton``, or ``auto``: Triton on CUDA devices.

    Raises:
        MoeError: If a value is out of range.
    """

    def __init__(
        self,
        width: int,
        num_experts: int,
        experts_per_token: int,
        *,
        score: str = "softmax",
        is_renormalised: bool = True,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        check_range("num_experts", num_experts, low=1)
        check_range("experts_per_token", experts_per_token, low=1, high=num_experts, remedy="add experts or lower it")
        check_choice("score", score, SCORES)
        check_choice("backend", backend, BACKENDS)
        self.experts_per_token, self.score, self.is_renormalised = experts_per_token, score, is_renormalised
        self.backend = backend
        self.weight_ED = nn.Parameter(torch.randn(num_experts, width) / math.sqrt(width))

    def forward(self, x_TD: torch.Tensor, info: TokenInfo) -> Routing:
        """Route; the same in training and inference, each token by itself."""
        num_tokens, num_experts = x_TD.shape[0], self.weight_ED.shape[0]
        is_real_T = info.real(num_tokens, x_TD.device)
        logits_TE = logits_of(x_TD, self.weight_ED)
        if use_triton(self.backend, logits_TE) and takes(logits_TE):
            expert_TK, weight_TK, probs_TE, by_expert = route_top_k(
                logits_TE, self.experts_per_token, score=self.score, is_renormalised=self.is_renormalised
            )
        else:
            scores_TE, by_expert = _scores(logits_TE, self.score), None
            expert_TK, weight_TK = self._choose(logits_TE, scores_TE)
            probs_TE = scores_TE if self.score == "softmax" else _normalised(scores_TE)
        token_TK = torch.arange(num_tokens, device=x_TD.device).unsqueeze(1).expand_as(expert_TK)
        is_whole = info.is_real_T is None  # then nothing is picked out, which would need the host to count
        return Routing(
            token_N=(token_TK if is_whole else token_TK[is_real_T]).reshape(-1),
            expert_N=(expert_TK if is_whole else expert_TK[is_real_T]).reshape(-1),
            weight_N=(weight_TK if is_whole else weight_TK[is_real_T]).reshape(-1),
            num_tokens=num_tokens,
            num_experts=num_experts,
            is_real_T=is_real_T,
            logits_TE=logits_TE,
            probs_TE=probs_TE,
            by_expert=by_expert if is_whole else None,
        )

    def _choose(self, logits_TE: torch.Tensor, scores_TE: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if self.score == "softmax" and self.is_renormalised and self.backend != "triton":
            # the same as scaling the K probabilities, without a sum over all experts, whose rounding depends on their
            # order
            return weighted_experts(logits_TE, self.experts_per_token)
        expert_TK = top_experts(logits_TE, self.experts_per_token, backend=self.backend)
        if not self.is_renormalised:
            return expert_TK, scores_TE.gather(1, expert_TK)
        if self.score == "sigmoid":
            return expert_TK, _normalised(scores_TE.gather(1, expert_TK))
        return expert_TK, torch.softmax(logits_TE.gather(1, expert_TK), dim=-1)


class SwitchRouter(TopKRouter):
    """One expert per token, weighted by its softmax probability (Fedus et al. 2021, https://arxiv.org/abs/2101.03961)."""

    def __init__(self, width: int, num_experts: int) -> None:
        super().__init__(width, num_experts, 1, score="softmax", is_renormalised=False)


class ExpertChoiceRouter(nn.Module):
    """Each expert takes the tokens with the highest scores (Zhou et al. 2022, https://arxiv.org/abs/2202.09368).

    Looks at the whole batch, in training and inference alike, so it is not causal; `ModalityLayer` has auxiliary
    routers that make it so.

    Args:
        width: Model width D.
        num_experts: E.
        capacity_factor: Mean number of experts per token; each expert takes ``ceil(factor * T / E)`` tokens, at least 1
            and at most T.
        score: ``softmax`` over the experts, or ``sigmoid`` of each.

    Raises:
        MoeError: If a value is out of range.
    """

    def __init__(self, width: int, num_experts: int, *, capacity_factor: float = 1.0, score: str = "softmax") -> None:
        super().__init__()
        check_range("num_experts", num_experts, low=1)
        check_range("capacity_factor", capacity_factor, low=1e-9, high=num_experts)
        check_choice("score", score, SCORES)
        self.capacity_factor, self.score = capacity_factor, score
        self.weight_ED = nn.Parameter(torch.randn(num_experts, width) / math.sqrt(width))

    def forward(self, x_TD: torch.Tensor, info: TokenInfo) -> Routing:
        """Route the whole batch."""
        num_tokens, num_experts = x_TD.shape[0], self.weight_ED.shape[0]
        is_real_T = info.real(num_tokens, x_TD.device)
        logits_TE = logits_of(x_TD, self.weight_ED)
        scores_TE = _scores(logits_TE, self.score)
        real_N = is_real_T.nonzero().squeeze(1)
        capacity = min(real_N.numel(), max(1, math.ceil(self.capacity_factor * real_N.numel() / num_experts)))
        place_EC = top_tokens(scores_TE.detach()[real_N], capacity)
        token_N = real_N[place_EC.reshape(-1)]
        expert_N = torch.arange(num_experts, device=x_TD.device).repeat_interleave(capacity)
        return Routing(
            token_N=token_N,
            expert_N=expert_N,
            weight_N=scores_TE[token_N, expert_N],
            num_tokens=num_tokens,
            num_experts=num_experts,
            is_real_T=is_real_T,
            logits_TE=logits_TE,
            probs_TE=scores_TE if self.score == "softmax" else _normalised(scores_TE),
        )


def _by_label(expert_T: torch.Tensor, num_experts: int, is_real_T: torch.Tensor, dtype: torch.dtype) -> Routing:
    token_N = is_real_T.nonzero().squeeze(1)
    return Routing(
        token_N=token_N,
        expert_N=expert_T[token_N],
        weight_N=torch.ones(token_N.numel(), dtype=dtype, device=token_N.device),
        num_tokens=expert_T.numel(),
        num_experts=num_experts,
        is_real_T=is_real_T,
    )


class HashRouter(nn.Module):
    """A fixed pseudo-random expert per vocabulary id (Roller et al. 2021, https://arxiv.org/abs/2106.04426).

    Args:
        num_experts: E.
        seed: Another seed gives another table.
    """

    def __init__(self, num_experts: int, *, seed: int = 0) -> None:
        super().__init__()
        check_range("num_experts", num_experts, low=1)
        self.num_experts, self.seed = num_experts, seed

    def expert_of(self, token_id_T: torch.Tensor) -> torch.Tensor:
        """Expert per vocabulary id: the 64-bit finaliser of SplitMix, modulo E."""
        bits_T = token_id_T.long() + ((self.seed + 1) * 0x1E3779B97F4A7C15) % 2**62
        for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)):
            bits_T = (bits_T ^ ((bits_T >> shift) & ((1 << (64 - shift)) - 1))) * factor
        return (bits_T ^ ((bits_T >> 31) & ((1 << 33) - 1))).remainder(self.num_experts)

    def forward(self, x_TD: torch.Tensor, info: TokenInfo) -> Routing:
        """Route by ``info.token_id_T``."""
        token_id_T = info.need("token_id_T", x_TD.shape[0], 2**62).to(x_TD.device)
        is_real_T = info.real(x_TD.shape[0], x_TD.device)
        return _by_label(self.expert_of(token_id_T), self.num_experts, is_real_T, x_TD.dtype)


class DomainRouter(nn.Module):
    """The expert of a token is its domain (DEMix, Gururangan et al. 2021, https://arxiv.org/abs/2108.05036).

    Args:
        num_experts: Number of domains.
    """

    def __init__(self, num_experts: int) -> None:
        super().__init__()
        check_range("num_experts", num_experts, low=1)
        self.num_experts = num_experts

    def forward(self, x_TD: torch.Tensor, info: TokenInfo) -> Routing:
        """Route by ``info.domain_T``."""
        domain_T = info.need("domain_T", x_TD.shape[0], self.num_experts).to(x_TD.device)
        return _by_label(domain_T, self.num_experts, info.real(x_TD.shape[0], x_TD.device), x_TD.dtype)


class BalancedRouter(nn.Module):
    """One expert per token: balanced in training, its best at inference (BASE, https://arxiv.org/abs/2103.16716).

    The combine weight is the sigmoid of the score, the only path of the gradient to the centroids.

    Args:
        width: Model width D.
        num_experts: E.
        method: How `assign_balanced` finds the training assignment.
        is_priced: Whether a token's best expert at inference has the highest score minus running price
            (`RunningPrices`, which must be told where updates end); otherwise the highest score, as in the paper.
            The auction of the published code has no prices.

    Raises:
        MoeError: If a value is out of range.
    """

    def __init__(self, width: int, num_experts: int, *, method: str = "exact", is_priced: bool = True) -> None:
        super().__init__()
        check_range("num_experts", num_experts, low=1)
        check_choice("method of BalancedRouter", method, METHODS)
        self.method = method
        self.prices = RunningPrices(num_experts) if is_priced and method == "exact" else None
        # Adam moves every number by about the learning rate. Centroids of length 0.1 would turn around within a few
        # updates at the rates of small models, and tokens would change experts all the time.
        self.large_centroid_ED = nn.Parameter(torch.empty(num_experts, width))
        nn.init.orthogonal_(self.large_centroid_ED)

    def centroids(self) -> torch.Tensor:
        """Centroids ``(E, D)``; they start orthogonal, of length 0.1, as in the paper."""
        return self.large_centroid_ED * _CENTROID_SCALE

    def forward(self, x_TD: torch.Tensor, info: TokenInfo) -> Routing:
        """Route: the whole batch in training mode, each token by itself at inference."""
        num_tokens, num_experts = x_TD.shape[0], self.large_centroid_ED.shape[0]
        is_real_T = info.real(num_tokens, x_TD.device)
        logits_TE = logits_of(x_TD, self.large_centroid_ED) * _CENTROID_SCALE
        token_N = is_real_T.nonzero().squeeze(1)
        choosing_NE = logits_TE.detach()[token_N]
        expert_N = self._balanced(choosing_NE) if self.training else self._best(choosing_NE)
        return Routing(
            token_N=token_N,
            expert_N=expert_N,
            weight_N=torch.sigmoid(logits_TE[token_N, expert_N]),
            num_tokens=num_tokens,
            num_experts=num_experts,
            is_real_T=is_real_T,
            logits_TE=logits_TE,
            probs_TE=torch.softmax(logits_TE, dim=-1),
        )

    def _balanced(self, scores_TE: torch.Tensor) -> torch.Tensor:
        if self.prices is None:
            return assign_balanced(scores_TE, method=self.method)
        solved = solve_assignment(scores_TE)
        self.prices.observe(solved.prices_E, scores_TE.shape[0])
        return solved.expert_T

    def _best(self, scores_TE: torch.Tensor) -> torch.Tensor:
        return scores_TE.argmax(1) if self.prices is None else (scores_TE - self.prices.price_E).argmax(1)
