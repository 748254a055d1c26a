"""Expert placement: balance, never worse, the optimum on small cases, renumbering to the last bit."""

from itertools import permutations, product

import pytest
import torch

from moe_kernels import TopKConfig
from moe_kernels.placement import affinity_of, count_crossings, place_experts, renumber_experts


def random_trace(num_tokens, num_layers, num_experts, seed):
    """A Markov chain over experts with a random preference in every layer."""
    generator = torch.Generator().manual_seed(seed)
    steps = torch.rand(num_layers, num_experts, num_experts, generator=generator).pow(6)
    trace = torch.zeros(num_tokens, num_layers, dtype=torch.int64)
    trace[:, 0] = torch.randint(num_experts, (num_tokens,), generator=generator)
    for layer in range(1, num_layers):
        trace[:, layer] = torch.multinomial(steps[layer][trace[:, layer - 1]], 1, generator=generator).squeeze(1)
    return trace


def test_affinity_counts_pairs():
    affinity = affinity_of(torch.tensor([[0, 1, 1], [0, 1, 0], [2, 1, 0]]), 3)
    assert affinity[0].tolist() == [[0, 2, 0], [0, 0, 0], [0, 1, 0]]
    assert affinity[1].tolist() == [[0, 0, 0], [2, 1, 0], [0, 0, 0]]


@pytest.mark.parametrize(("num_experts", "num_ranks"), [(8, 2), (8, 4), (10, 4), (6, 6), (5, 1)])
def test_balanced_and_never_worse_than_the_order_of_ids(num_experts, num_ranks):
    affinity = affinity_of(random_trace(3000, 5, num_experts, num_experts), num_experts)
    placed = place_experts(affinity, num_ranks)
    for rank_E in placed.rank_LE:
        counts = torch.bincount(rank_E, minlength=num_ranks)
        assert counts.max() - counts.min() <= 1
    assert placed.num_crossings == count_crossings(affinity, placed.rank_LE)
    assert placed.num_crossings <= placed.num_crossings_before
    if 1 < num_ranks < num_experts:
        assert placed.num_crossings < placed.num_crossings_before


def test_a_perfectly_affine_trace_has_no_crossing():
    generator = torch.Generator().manual_seed(0)
    maps = torch.stack([torch.randperm(8, generator=generator) for _ in range(4)])
    start = torch.randint(8, (500,), generator=generator)
    placed = place_experts(affinity_of(maps[:, start].t(), 8), 4)
    assert placed.num_crossings == 0
    assert placed.num_crossings_before > 0


def test_near_the_optimum_by_brute_force():
    halves = sorted(set(permutations([0, 0, 1, 1])))
    regrets = []
    for seed in range(10):
        affinity = affinity_of(random_trace(400, 3, 4, seed), 4)
        every = product(halves, repeat=2)
        best = min(count_crossings(affinity, torch.tensor([(0, 0, 1, 1), *rest])) for rest in every)
        best = min(best, *(count_crossings(affinity, torch.tensor(ranks)) for ranks in product(halves, repeat=3)))
        regrets.append(place_experts(affinity, 2).num_crossings - best)
    assert min(regrets) == 0
    assert sum(regret == 0 for regret in regrets) >= 5
    assert max(regrets) <= 80


@pytest.mark.parametrize("experts_per_token", [1, 2, 4])
@pytest.mark.parametrize("backend", ["loop", "grouped_mm"])
@pytest.mark.parametrize("num_experts", [16, 32, 6])
def test_renumbering_leaves_outputs_bit_identical(experts_per_token, backend, num_experts):
    torch.manual_seed(0)
    options = {"experts_per_token": experts_per_token, "backend": backend}
    layer, x = TopKConfig(width=16, hidden_width=16, num_experts=num_experts, **options).build(), torch.randn(50, 16)
    before = layer(x)
    order = renumber_experts(layer, torch.randint(4, (num_experts,)))
    after = layer(x)
    assert torch.equal(after.statistics.counts_E, before.statistics.counts_E[order])
    if num_experts % 16 == 0:  # below a vector's width the matrix product of the router rounds its columns differently
        assert torch.equal(after.hidden, before.hidden)
    torch.testing.assert_close(after.hidden, before.hidden)


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="expert ids of the trace: got 4"):
        affinity_of(torch.tensor([[0, 4]]), 4)
    with pytest.raises(ValueError, match="integers"):
        affinity_of(torch.zeros(4), 4)
    with pytest.raises(ValueError, match="at most one rank per expert"):
        place_experts(torch.zeros(2, 4, 4, dtype=torch.int64), 5)
    hashed = TopKConfig(width=8, hidden_width=8, num_experts=4, router="hash").build()
    with pytest.raises(ValueError, match="HashRouter with SwigluExperts"):
        renumber_experts(hashed, torch.zeros(4))
    with pytest.raises(ValueError, match="one row of rank_LE"):
        renumber_experts(TopKConfig(width=8, hidden_width=8, num_experts=4).build(), torch.zeros(3))
