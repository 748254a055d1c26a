"""Dispatch and combine, capacity: against loops, and gradients in float64."""

import pytest
import torch

from moe_kernels.dispatch import capacity_of, combine, dispatch, limit_capacity
from moe_kernels.types import Routing

CASES = [(7, 3, 2), (1, 4, 1), (16, 4, 4), (5, 1, 1), (0, 3, 2), (3, 9, 2)]


def random_routing(num_tokens, num_experts, copies, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    expert_TK = torch.rand(num_tokens, num_experts, generator=generator).argsort(1)[:, :copies]
    return Routing(
        token_N=torch.arange(num_tokens).repeat_interleave(expert_TK.shape[1]),
        expert_N=expert_TK.reshape(-1),
        weight_N=torch.rand(expert_TK.numel(), generator=generator, dtype=dtype),
        num_tokens=num_tokens,
        num_experts=num_experts,
        is_real_T=torch.ones(num_tokens, dtype=torch.bool),
    )


@pytest.mark.parametrize(("num_tokens", "num_experts", "copies"), CASES)
def test_equals_a_loop_over_copies(num_tokens, num_experts, copies):
    routing = random_routing(num_tokens, num_experts, copies)
    x = torch.randn(num_tokens, 5, dtype=torch.float64)
    matrices = torch.randn(num_experts, 5, 5, dtype=torch.float64)
    dispatched = dispatch(x, routing)
    assert dispatched.counts_E.tolist() == [int((routing.expert_N == e).sum()) for e in range(num_experts)]
    parts = dispatched.rows_ND.split(dispatched.counts_E.tolist())
    y = combine(torch.cat([part @ matrix for part, matrix in zip(parts, matrices, strict=True)]), dispatched)
    expected = torch.zeros_like(x)
    for token, expert, weight in zip(routing.token_N, routing.expert_N, routing.weight_N, strict=True):
        expected[token] += weight * (x[token] @ matrices[expert])
    torch.testing.assert_close(y, expected)


def test_round_trip_with_unit_weights_is_the_identity_on_values_and_gradients():
    routing = random_routing(11, 4, 1)
    unit = Routing(**{**vars(routing), "weight_N": torch.ones(11, dtype=torch.float64)})
    x = torch.randn(11, 3, dtype=torch.float64, requires_grad=True)
    dispatched = dispatch(x, unit)
    y = combine(dispatched.rows_ND, dispatched)
    upstream = torch.randn(11, 3, dtype=torch.float64)
    (gradient,) = torch.autograd.grad(y, x, upstream)
    assert torch.equal(y, x)
    assert torch.equal(gradient, upstream)


def test_gradcheck_in_states_and_weights():
    routing = random_routing(6, 3, 2)

    def function(x, weight):
        dispatched = dispatch(x, Routing(**{**vars(routing), "weight_N": weight}))
        return combine(dispatched.rows_ND.sin(), dispatched)

    x = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    weight = routing.weight_N.clone().requires_grad_()
    assert torch.autograd.gradcheck(function, (x, weight))


@pytest.mark.parametrize("priority", ["position", "weight"])
def test_capacity_drops_what_is_above_it_and_counts_it(priority):
    routing = random_routing(40, 4, 2, seed=3)
    limited = limit_capacity(routing, 0.8, priority=priority)
    capacity = capacity_of(80, 4, 0.8)
    before, after = routing.expert_counts(), limited.expert_counts()
    assert torch.equal(after, before.clamp(max=capacity))
    assert limited.num_dropped == int((before - after).sum()) > 0
    for expert in range(4):
        mine = routing.expert_N == expert
        if priority == "position":
            expected = routing.token_N[mine][:capacity]
        else:
            expected = routing.token_N[mine][routing.weight_N[mine].argsort(descending=True)[:capacity]]
        kept = limited.token_N[limited.expert_N == expert]
        assert sorted(kept.tolist()) == sorted(expected.tolist())


def test_no_capacity_drops_nothing_and_bad_values_are_refused():
    routing = random_routing(10, 2, 1)
    assert limit_capacity(routing, None) is routing
    with pytest.raises(ValueError, match="capacity_factor: got 0"):
        limit_capacity(routing, 0)
    with pytest.raises(ValueError, match="position, weight"):
        limit_capacity(routing, 1.0, priority="random")
