"""Which rank should hold which expert: few tokens should change ranks from one layer to the next.

Shapes: T tokens, L layers, E experts per layer, P ranks.
"""

from dataclasses import dataclass

import torch

from moe_kernels.assignment import assign_balanced
from moe_kernels.errors import MoeError, check_range
from moe_kernels.experts import SwigluExperts
from moe_kernels.layers.routed import RoutedLayer
from moe_kernels.routers import TopKRouter


@dataclass(frozen=True, kw_only=True)
class Placement:
    """A rank for every expert of every layer."""

    rank_LE: torch.Tensor
    """Rank of each expert ``(L, E)``, int64; every rank has ``floor(E/P)`` or ``ceil(E/P)`` experts of each layer."""
    num_crossings: int
    """Tokens of the trace that change ranks, summed over consecutive layers."""
    num_crossings_before: int
    """The same when experts are placed in the order of their ids."""


def affinity_of(trace_TL: torch.Tensor, num_experts: int) -> torch.Tensor:
    """Count how many tokens use expert a in a layer and expert b in the next.

    Args:
        trace_TL: First expert of every token in every layer ``(T, L)``, integers; a few thousand tokens do.
        num_experts: E.

    Returns:
        Counts ``(L - 1, E, E)``, int64.

    Raises:
        MoeError: If the trace is not ``(T, L)`` or holds ids outside ``[0, E)``.
    """
    if trace_TL.dim() != 2 or trace_TL.is_floating_point() or trace_TL.shape[1] < 1:
        got = f"{trace_TL.dtype} of {tuple(trace_TL.shape)}"
        raise MoeError("trace", got=got, allowed="integers (tokens, layers)", remedy="record one expert id per layer")
    if trace_TL.numel():
        check_range("expert ids of the trace", int(trace_TL.min()), low=0, high=num_experts - 1)
        check_range("expert ids of the trace", int(trace_TL.max()), low=0, high=num_experts - 1)
    pairs = trace_TL[:, :-1] * num_experts + trace_TL[:, 1:]
    counts = [torch.bincount(pairs[:, layer], minlength=num_experts**2) for layer in range(pairs.shape[1])]
    return (
        torch.stack(counts).view(-1, num_experts, num_experts)
        if counts
        else pairs.new_zeros(0, num_experts, num_experts)
    )


def count_crossings(affinity_LEE: torch.Tensor, rank_LE: torch.Tensor) -> int:
    """Tokens that change ranks between consecutive layers.

    Args:
        affinity_LEE: What `affinity_of` returned.
        rank_LE: A rank for every expert ``(L, E)``.

    Returns:
        The number.
    """
    is_crossing_LEE = rank_LE[:-1, :, None] != rank_LE[1:, None, :]
    return int((affinity_LEE * is_crossing_LEE).sum())


def _stay_scores(affinity_LEE: torch.Tensor, rank_LE: torch.Tensor, layer: int, num_ranks: int) -> torch.Tensor:
    """Tokens of each expert of a layer that would stay on each rank ``(E, P)``."""
    scores_EP = torch.zeros(rank_LE.shape[1], num_ranks, dtype=torch.float64)
    one_hot = torch.nn.functional.one_hot
    if layer > 0:
        scores_EP += affinity_LEE[layer - 1].t().double() @ one_hot(rank_LE[layer - 1], num_ranks).double()
    if layer + 1 < rank_LE.shape[0]:
        scores_EP += affinity_LEE[layer].double() @ one_hot(rank_LE[layer + 1], num_ranks).double()
    return scores_EP


def place_experts(affinity_LEE: torch.Tensor, num_ranks: int, *, num_rounds_max: int = 20) -> Placement:
    """Place experts so that few tokens change ranks (ExFlow, Yao et al. 2024, https://arxiv.org/abs/2401.08383).

    The published integer program, solved by turns: with its neighbours fixed, each layer's best balanced placement is a
    balanced assignment of experts to ranks, solved exactly, so crossings never rise. Two starts are tried, the order of
    the ids and a chain from the first layer on.

    Args:
        affinity_LEE: What `affinity_of` returned.
        num_ranks: P, at most E.
        num_rounds_max: Passes over the layers after which to stop.

    Returns:
        The best placement found; never worse than the order of the ids.
    """
    num_layers, num_experts = affinity_LEE.shape[0] + 1, affinity_LEE.shape[1]
    check_range("num_ranks", num_ranks, low=1, high=num_experts, remedy="use at most one rank per expert")
    by_id_E = torch.arange(num_experts) * num_ranks // num_experts
    by_id_LE = by_id_E.expand(num_layers, -1).clone()
    chain_LE = by_id_LE.clone()
    for layer in range(1, num_layers):
        chain_LE[layer] = assign_balanced(_stay_scores(affinity_LEE[:layer], chain_LE[: layer + 1], layer, num_ranks))
    best_LE, fewest = by_id_LE, count_crossings(affinity_LEE, by_id_LE)
    before = fewest
    for start_LE in (by_id_LE, chain_LE):
        rank_LE = start_LE.clone()
        crossings = count_crossings(affinity_LEE, rank_LE)
        for _ in range(num_rounds_max):
            for layer in range(num_layers):
                rank_LE[layer] = assign_balanced(_stay_scores(affinity_LEE, rank_LE, layer, num_ranks))
            now = count_crossings(affinity_LEE, rank_LE)
            if now >= crossings:
                break
            crossings = now
        if count_crossings(affinity_LEE, rank_LE) < fewest:
            best_LE, fewest = rank_LE, count_crossings(affinity_LEE, rank_LE)
    return Placement(rank_LE=best_LE, num_crossings=fewest, num_crossings_before=before)


@torch.no_grad()
def renumber_experts(layer: RoutedLayer, rank_E: torch.Tensor) -> torch.Tensor:
    """Renumber a layer's experts in place so that consecutive ids lie on one rank.

    With renormalised weights, and as many experts as fill vectors (multiples of 16), the outputs stay bit-identical.
    Otherwise the router's softmax or matrix product may round differently in another order, and outputs stay equal up
    to that.

    Args:
        layer: A layer with a `TopKRouter` and `SwigluExperts`.
        rank_E: Rank of each expert ``(E,)``, one row of a `Placement`.

    Returns:
        Old id of each new one ``(E,)``.

    Raises:
        MoeError: If the layer has other parts or the ranks another length.
    """
    router, experts = layer.router, layer.experts
    if not isinstance(router, TopKRouter) or not isinstance(experts, SwigluExperts):
        got = f"{type(router).__name__} with {type(experts).__name__}"
        remedy = "renumber before the experts are spread over ranks"
        raise MoeError("layer to renumber", got=got, allowed="TopKRouter with SwigluExperts", remedy=remedy)
    if rank_E.shape != (experts.num_experts,):
        got = tuple(rank_E.shape)
        raise MoeError("rank_E", got=got, allowed=f"({experts.num_experts},)", remedy="pass one row of rank_LE")
    order_E = torch.argsort(rank_E, stable=True)
    for parameter in (router.weight_ED, experts.w1_EDF, experts.w3_EDF, experts.w2_EFD):
        parameter.copy_(parameter[order_E])
    if layer.balance is not None:
        layer.balance.before_E.copy_(layer.balance.before_E[order_E])
        layer.balance.current_E.copy_(layer.balance.current_E[order_E])
    return order_E
