"""Assignment by auction with epsilon scaling: invariants A1 to A6 against scipy; Triton equals torch to the bit."""

import numpy as np
import pytest
import torch
from test_assignment import KINDS, best_total, make_scores

from moe_kernels import assign_balanced, solve_assignment
from moe_kernels.epsilon_auction import LEVELS, AuctionState, round_in_torch, run_auction
from moe_kernels.triton_kernels.auction import RoundsInTriton


def cases(count, most_tokens, most_experts):
    rng = np.random.default_rng(3)
    for index in range(count):
        num_tokens, num_experts = int(rng.integers(1, most_tokens)), int(rng.integers(2, most_experts))
        scores = make_scores(KINDS[index % len(KINDS)], num_tokens, num_experts, index)
        yield scores if index % 3 == 0 else scores.astype(np.float32)


def guarantee(scores):
    """What the docstring promises."""
    num_tokens, num_experts = scores.shape
    return (2 * num_tokens + num_experts) * (scores.max() - scores.min()) / LEVELS


def check(scores, expert, gap):
    num_tokens, num_experts = scores.shape
    load = np.bincount(expert, minlength=num_experts)
    assert len(load) == num_experts
    assert load.min() >= num_tokens // num_experts
    assert load.max() <= -(-num_tokens // num_experts)
    scores = scores.astype(np.float64)
    regret = best_total(scores) - scores[np.arange(num_tokens), expert].sum()
    noise = 1e-9 * np.abs(scores).max() * num_tokens
    assert regret <= gap + noise
    assert gap <= guarantee(scores) + noise


def test_a1_a2_a5_balanced_and_within_the_guarantee_on_220_instances_in_torch():
    for scores in cases(220, 50, 12):
        found = run_auction(torch.from_numpy(scores))
        assert found.is_finished
        check(scores, found.expert_T.numpy(), float(found.gap))


@pytest.mark.parametrize("count", [11, pytest.param(55, marks=pytest.mark.slow)])
def test_a1_a2_a5_balanced_and_within_the_guarantee(triton_device, count):
    for scores in cases(count, 15, 4):
        solved = solve_assignment(torch.from_numpy(scores).to(triton_device), backend="triton")
        check(scores, solved.expert_T.cpu().numpy(), solved.gap)


def start(scores, device):
    num_tokens, num_experts = scores.shape
    return AuctionState(
        score_TE=(scores * 1000).round().int().to(device),
        price_E=torch.arange(num_experts, dtype=torch.int32, device=device),
        expert_T=torch.full((num_tokens,), -1, dtype=torch.int32, device=device),
        bid_T=torch.zeros(num_tokens, dtype=torch.int32, device=device),
        idle_E=torch.tensor([7, -1] * num_experts, dtype=torch.int32, device=device)[:num_experts],
        num_idle=-num_tokens % num_experts,
        places=-(-num_tokens // num_experts),
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("num_tokens", "num_experts"), [(64, 4), (70, 5), (3, 8), (80, 17)])
def test_a6_rounds_equal_those_in_torch(kind, num_tokens, num_experts, triton_device):
    scores = torch.from_numpy(make_scores(kind, num_tokens, num_experts, 2))
    fast, slow = start(scores, triton_device), start(scores, "cpu")
    rounds = RoundsInTriton(fast.score_TE)
    for epsilon in (100, 100, 100, 7, 1):
        rounds(fast, epsilon)
        round_in_torch(slow, epsilon)
        for name in ("price_E", "expert_T", "idle_E"):
            assert torch.equal(getattr(fast, name).cpu(), getattr(slow, name)), name


def test_a1_edge_shapes(triton_device):
    assert assign_balanced(torch.randn(5, 1, device=triton_device), backend="triton").tolist() == [0] * 5
    assert assign_balanced(torch.randn(0, 4, device=triton_device), backend="triton").shape == (0,)
    few = assign_balanced(torch.randn(3, 9, device=triton_device), backend="triton")
    assert len(set(few.tolist())) == 3
    assert assign_balanced(torch.tensor([[0.0, 3.0, 1.0]], device=triton_device), backend="triton").tolist() == [1]


def test_a4_what_is_not_finite_is_replaced_and_counted(triton_device):
    scores = torch.randn(64, 4, generator=torch.Generator().manual_seed(1))
    scores[3], scores[9, 1], scores[11, 2] = torch.nan, -torch.inf, torch.inf
    fast, slow = (solve_assignment(scores.to(triton_device), backend=backend) for backend in ("triton", "torch"))
    assert fast.num_replaced == slow.num_replaced == 6
    assert torch.equal(fast.expert_T, slow.expert_T)
    nothing = assign_balanced(torch.full((8, 4), torch.nan, device=triton_device), backend="triton")
    assert torch.bincount(nothing, minlength=4).tolist() == [2, 2, 2, 2]


def test_warm_prices_save_rounds_and_keep_the_guarantee(triton_device):
    scores = make_scores("token", 96, 4, 1)
    cold = solve_assignment(torch.from_numpy(scores).to(triton_device), backend="triton")
    moved = scores + 0.001 * np.random.default_rng(0).standard_normal(scores.shape)
    warm = solve_assignment(torch.from_numpy(moved).to(triton_device), warm_prices_E=cold.prices_E, backend="triton")
    assert warm.num_sweeps < cold.num_sweeps
    check(moved, warm.expert_T.cpu().numpy(), warm.gap)


def test_a5_an_auction_that_does_not_end_says_so():
    found = run_auction(torch.from_numpy(make_scores("iid", 200, 8, 0)), num_rounds_max=2)
    assert not found.is_finished
    assert found.num_rounds == 2


def test_an_unknown_backend_is_refused():
    with pytest.raises(ValueError, match="auto, torch, triton"):
        assign_balanced(torch.zeros(4, 2), backend="cuda")
