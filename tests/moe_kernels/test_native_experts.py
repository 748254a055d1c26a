"""Native experts: equal to the reference loop on every shape, forward and backward; gradients in float64."""

from pathlib import Path

import pytest
import torch

from moe_kernels.dispatch import combine, dispatch, order_by_token, run_experts
from moe_kernels.experts import SwigluExperts, swiglu_loop
from moe_kernels.native import is_native_on
from moe_kernels.native_experts import is_native, swiglu_rows_native, swiglu_tokens_native
from moe_kernels.selection import sort_copies
from moe_kernels.types import Routing

SHAPES = [  # experts, width, hidden width, rows of each expert
    (1, 8, 8, [3]),
    (1, 64, 64, [0]),
    (4, 16, 24, [0, 7, 0, 2]),
    (3, 66, 130, [1, 65, 12]),
    (2, 100, 34, [1100, 513]),
    (5, 32, 600, [6, 12, 5, 1, 0]),
]


def make_weights(num_experts, width, hidden_width, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(num_experts, width, hidden_width)] * 2 + [(num_experts, hidden_width, width)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64) / shape[1] ** 0.5 for shape in shapes]


def make_routing(num_tokens, num_experts, copies, seed=0):
    generator = torch.Generator().manual_seed(seed)
    expert_TK = torch.rand(num_tokens, num_experts, generator=generator).argsort(1)[:, :copies]
    kept_N = torch.rand(expert_TK.numel(), generator=generator) < 0.9  # some tokens have fewer copies, some none
    return Routing(
        token_N=torch.arange(num_tokens).repeat_interleave(expert_TK.shape[1])[kept_N],
        expert_N=expert_TK.reshape(-1)[kept_N],
        weight_N=torch.rand(expert_TK.numel(), generator=generator, dtype=torch.float64)[kept_N],
        num_tokens=num_tokens,
        num_experts=num_experts,
        is_real_T=torch.ones(num_tokens, dtype=torch.bool),
    )


def run_tokens(x, routing, weights):
    order = sort_copies(routing.expert_N, routing.num_experts)
    by_token = order_by_token(routing.token_N, routing.num_tokens)
    return swiglu_tokens_native(x, routing, order, by_token, tuple(weights))


def run_plainly(x, routing, weights):
    dispatched = dispatch(x, routing)
    return combine(swiglu_loop(dispatched.rows_ND, dispatched.counts_E, tuple(weights)), dispatched)


def gradients(value, inputs, seed=5):
    upstream = torch.randn(value.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.autograd.grad(value, inputs, upstream.bfloat16().to(value.dtype))


def assert_near(got, expected, tolerance=1.5e-2):
    for fast, slow in zip(got, expected, strict=True):
        assert fast.shape == slow.shape
        scale = float(slow.detach().norm()) or 1.0
        assert float((fast.double() - slow).detach().norm()) <= tolerance * scale


def rounded(*tensors):
    """In bfloat16, and the same values in float64, both with gradients."""
    low = [tensor.bfloat16().requires_grad_() for tensor in tensors]
    return low, [tensor.detach().double().requires_grad_() for tensor in low]


def test_this_processor_takes_the_native_code_where_it_has_the_instructions():
    flags = Path("/proc/cpuinfo").read_text().split() if Path("/proc/cpuinfo").exists() else []
    expected = is_native_on() and "avx512_bf16" in flags and "amx_bf16" not in flags
    assert is_native(torch.zeros(2, 8, dtype=torch.bfloat16), 8) == expected
    assert not is_native(torch.zeros(2, 8), 8)
    assert not is_native(torch.zeros(2, 7, dtype=torch.bfloat16), 8)


@pytest.mark.parametrize(("num_experts", "width", "hidden_width", "counts"), SHAPES)
def test_rows_equal_the_loop_forward_and_backward(num_experts, width, hidden_width, counts):
    rows = torch.randn(sum(counts), width, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    low, high = rounded(rows, *make_weights(num_experts, width, hidden_width))
    fast = swiglu_rows_native(low[0], torch.tensor(counts), tuple(low[1:]))
    slow = swiglu_loop(high[0], torch.tensor(counts), tuple(high[1:]))
    assert_near([fast, *gradients(fast, low)], [slow, *gradients(slow, high)])


@pytest.mark.parametrize(
    ("num_tokens", "num_experts", "copies"), [(1, 1, 1), (3, 9, 2), (70, 5, 3), (1500, 2, 2), (0, 4, 2)]
)
def test_tokens_equal_dispatch_loop_combine_forward_and_backward(num_tokens, num_experts, copies):
    routing = make_routing(num_tokens, num_experts, copies)
    x = torch.randn(num_tokens, 40, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    low, high = rounded(x, *make_weights(num_experts, 40, 72))
    weight = routing.weight_N.float().requires_grad_()
    wide = weight.detach().double().requires_grad_()
    fast = run_tokens(low[0], Routing(**{**vars(routing), "weight_N": weight}), low[1:])
    slow = run_plainly(high[0], Routing(**{**vars(routing), "weight_N": wide}), high[1:])
    assert_near([fast, *gradients(fast, [*low, weight])], [slow, *gradients(slow, [*high, wide])])


def test_gradcheck_of_rows_and_tokens():
    weights = [weight.requires_grad_() for weight in make_weights(3, 4, 5)]
    rows = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    counts = torch.tensor([2, 0, 4])
    assert torch.autograd.gradcheck(lambda x, *w: swiglu_rows_native(x, counts, w), (rows, *weights))
    routing = make_routing(6, 3, 2)
    weight_N = routing.weight_N.clone().requires_grad_()

    def function(x, weight, *stacks):
        return run_tokens(x, Routing(**{**vars(routing), "weight_N": weight}), stacks)

    assert torch.autograd.gradcheck(function, (rows, weight_N, *weights))
    torch.testing.assert_close(function(rows, weight_N, *weights), run_plainly(rows, routing, weights))


def test_the_number_of_threads_and_the_numbering_of_experts_change_no_bit():
    routing, before = make_routing(300, 6, 2), torch.get_num_threads()
    low, _ = rounded(torch.randn(300, 48, generator=torch.Generator().manual_seed(3)), *make_weights(6, 48, 96))
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            y = run_tokens(low[0], routing, low[1:])
            results.append([y, *gradients(y, low)])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))
    new_id_E = torch.tensor([3, 5, 0, 1, 4, 2])
    relabelled = Routing(**{**vars(routing), "expert_N": new_id_E[routing.expert_N]})
    moved = [weight[new_id_E.argsort()] for weight in low[1:]]
    y = run_tokens(low[0], relabelled, moved)
    assert torch.equal(y, results[0][0])
    assert torch.equal(gradients(y, low[:1])[0], results[0][1])


def test_what_is_not_finite_stays_in_its_token():
    routing = make_routing(20, 3, 2)
    x = torch.randn(20, 16).bfloat16()
    x[4, 3], x[9, 0] = torch.nan, torch.inf
    low, _ = rounded(x, *make_weights(3, 16, 32))
    y = run_tokens(low[0], routing, low[1:])
    routed = set(routing.token_N.tolist())
    assert {token for token in range(20) if not y[token].isfinite().all()} == {4, 9} & routed


def test_frozen_stacks_get_no_gradient_and_inference_keeps_nothing():
    experts = SwigluExperts(4, 16, 24).to(torch.bfloat16)
    experts.w3_EDF.requires_grad_(False)
    x = torch.randn(30, 16).bfloat16()
    y = run_experts(x, make_routing(30, 4, 2), experts)
    y.sum().backward()  # an expanded gradient
    assert experts.w3_EDF.grad is None
    assert experts.w1_EDF.grad is not None
    with torch.no_grad():
        again = run_experts(x, make_routing(30, 4, 2), experts)
    assert torch.equal(again, y)
    assert not again.requires_grad


def test_more_experts_routed_to_than_there_are_is_refused():
    experts = SwigluExperts(3, 16, 24).to(torch.bfloat16)
    with pytest.raises(ValueError, match=r"allowed: \(3,\)"):
        run_experts(torch.randn(30, 16).bfloat16(), make_routing(30, 4, 2), experts)
