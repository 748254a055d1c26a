"""Exact balanced assignment in torch, for machines without a compiler; the same method as the native code.

Shapes: T tokens, E experts.
"""

from itertools import pairwise

import torch

_NEWTON_ROUNDS = 30
_DAMPING_LEAST = 1e-3


def _overflow(load_E: torch.Tensor, num_tokens: int) -> int:
    ceiling = -(-num_tokens // load_E.numel())
    return int((load_E - ceiling).clamp(min=0).sum())


def _newton_step(best: torch.return_types.topk, load_E: torch.Tensor, overflow: int) -> torch.Tensor:
    num_tokens, num_experts = best.values.shape[0], load_E.numel()
    margin_T = best.values[:, 0] - best.values[:, 1]
    share = min(0.5, max(0.02, 2.0 * overflow / num_tokens))
    band = margin_T.kthvalue(max(1, int(share * num_tokens))).values
    near = margin_T <= band
    first, second = best.indices[near, 0], best.indices[near, 1]
    pairs_EE = torch.bincount(first * num_experts + second, minlength=num_experts**2).view(num_experts, num_experts)
    pairs_EE = (pairs_EE + pairs_EE.t()).double()
    laplacian_EE = torch.diag(pairs_EE.sum(1) + 0.5) - pairs_EE
    excess_E = load_E.double() - num_tokens / num_experts
    step_E = 2 * band * torch.linalg.solve(laplacian_EE, excess_E)
    return step_E.clamp(-4 * band, 4 * band)


def balance_prices(scores_TE: torch.Tensor, prices_E: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Damped Newton steps on the dual until hardly any token overflows.

    Args:
        scores_TE: Finite float64 scores ``(T, E)``, ``E > 1``.
        prices_E: Where to start ``(E,)``.

    Returns:
        Prices ``(E,)`` and the passes over the scores.
    """
    num_tokens, num_experts = scores_TE.shape
    best = (scores_TE - prices_E).topk(2, dim=1)
    load_E = torch.bincount(best.indices[:, 0], minlength=num_experts)
    current, damping, sweeps = _overflow(load_E, num_tokens), 1.0, 1
    for _ in range(_NEWTON_ROUNDS):
        if current <= num_tokens // 256 or damping < _DAMPING_LEAST:
            break
        moved_E = prices_E + damping * _newton_step(best, load_E, current)
        trial = (scores_TE - moved_E).topk(2, dim=1)
        trial_load_E = torch.bincount(trial.indices[:, 0], minlength=num_experts)
        sweeps += 1
        if (overflow := _overflow(trial_load_E, num_tokens)) < current:
            prices_E, best, load_E, current, damping = moved_E, trial, trial_load_E, overflow, min(1.0, 2 * damping)
        else:
            damping *= 0.35
    return prices_E, sweeps


class _Repair:
    """Shortest augmenting paths between experts. Node ``E`` is the hub that hands out the units above the floor."""

    def __init__(self, scores_TE: torch.Tensor, prices_E: torch.Tensor) -> None:
        self.scores_TE = scores_TE
        num_tokens, self.num_experts = scores_TE.shape
        self.owner_T = (scores_TE - prices_E).argmax(1)
        self.load_E = torch.bincount(self.owner_T, minlength=self.num_experts)
        self.floor, room = divmod(num_tokens, self.num_experts)
        order = sorted(range(self.num_experts), key=lambda e: (-float(prices_E[e]), -int(self.load_E[e]), e))
        self.on_hub_E = torch.zeros(self.num_experts, dtype=torch.int64)
        self.on_hub_E[order[:room]] = 1
        hub_price = prices_E[order[room - 1]] if room else prices_E.new_zeros(())
        self.price = torch.cat([prices_E, hub_price.view(1)])
        self.cost = torch.full((self.num_experts + 1, self.num_experts + 1), torch.inf, dtype=torch.float64)
        for expert in range(self.num_experts):
            self._refresh(expert)
        if room:
            self._refresh_hub()

    def _refresh(self, expert: int) -> None:
        rows = self.scores_TE[self.owner_T == expert]
        loss = rows[:, expert : expert + 1] - rows
        least = loss.amin(0) if rows.shape[0] else torch.full((self.num_experts,), torch.inf, dtype=torch.float64)
        least[expert] = torch.inf
        self.cost[expert, : self.num_experts] = least

    def _refresh_hub(self) -> None:
        self.cost[: self.num_experts, self.num_experts] = torch.where(self.on_hub_E == 1, torch.inf, 0.0)
        self.cost[self.num_experts, : self.num_experts] = torch.where(self.on_hub_E == 1, 0.0, torch.inf)

    def _search(self, excess_E: torch.Tensor) -> list[int]:
        num_nodes = self.num_experts + 1
        distance = torch.full((num_nodes,), torch.inf, dtype=torch.float64)
        distance[: self.num_experts][excess_E > 0] = 0.0
        parent = torch.full((num_nodes,), -1, dtype=torch.int64)
        is_open = torch.ones(num_nodes, dtype=torch.bool)
        while True:
            node = int(torch.where(is_open, distance, torch.inf).argmin())
            if node < self.num_experts and int(excess_E[node]) < 0:
                break
            is_open[node] = False
            reduced = (self.cost[node] - self.price[node] + self.price).clamp(min=0)
            closer = is_open & (distance[node] + reduced < distance)
            distance = torch.where(closer, distance[node] + reduced, distance)
            parent[closer] = node
        self.price += torch.where(is_open, 0.0, distance[node] - distance).nan_to_num(nan=0.0)
        path = [node]
        while int(parent[path[-1]]) >= 0:
            path.append(int(parent[path[-1]]))
        return path[::-1]

    def _cheapest(self, source: int, target: int) -> torch.Tensor:
        members = (self.owner_T == source).nonzero().squeeze(1)
        loss = self.scores_TE[members, source] - self.scores_TE[members, target]
        return members[loss == loss.min()]

    def _push(self, path: list[int], most: int) -> None:
        hops = list(pairwise(path))
        hub = self.num_experts
        tokens = {hop: self._cheapest(*hop) for hop in hops if hub not in hop}
        amount = min([most, *(len(found) for found in tokens.values()), *(1 for hop in hops if hub in hop)])
        for hop in hops:
            source, target = hop
            if target == hub:
                self.on_hub_E[source] = 1
            elif source == hub:
                self.on_hub_E[target] = 0
            else:
                self.owner_T[tokens[hop][:amount]] = target
                self.load_E[source] -= amount
                self.load_E[target] += amount
        for node in path:
            if node != hub:
                self._refresh(node)
        if hub in path:
            self._refresh_hub()

    def run(self) -> int:
        """Repair until balanced; returns the number of paths."""
        paths = 0
        while True:
            excess_E = self.load_E - self.floor - self.on_hub_E
            if not bool((excess_E > 0).any()):
                return paths
            path = self._search(excess_E)
            self._push(path, min(int(excess_E[path[0]]), -int(excess_E[path[-1]])))
            paths += 1


def solve_exact(
    scores_TE: torch.Tensor, warm_prices_E: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, tuple[int, int, int]]:
    """Solve the balanced assignment exactly.

    Args:
        scores_TE: Finite float64 scores ``(T, E)`` on the CPU, ``T > 0`` and ``E > 1``.
        warm_prices_E: Prices to start from ``(E,)``, or ``None``.

    Returns:
        Expert ids ``(T,)``; prices ``(E,)``; passes over the scores, tokens that overflowed after them, paths.
    """
    num_tokens, num_experts = scores_TE.shape
    scale = 2.0**-900 if float(scores_TE.abs().max()) > 1e150 else 1.0
    scores_TE = scores_TE * scale
    if warm_prices_E is not None:
        start_E = warm_prices_E * scale
    else:
        place = max(1, num_tokens - max(1, num_tokens // num_experts) + 1)
        start_E = scores_TE.kthvalue(place, dim=0).values
    prices_E, sweeps = balance_prices(scores_TE, start_E)
    repair = _Repair(scores_TE, prices_E)
    overflow = _overflow(repair.load_E, num_tokens)
    paths = repair.run()
    return repair.owner_T, repair.price[:num_experts] / scale, (sweeps, overflow, paths)
