"""Experts: backends against the reference forward and backward, empty experts, modules as experts."""

import pytest
import torch

from moe_kernels.experts import ExpertList, ResidualFfnStack, SwigluExperts, SwigluFfn, swiglu_loop

COUNTS = [[3, 0, 5, 1], [0, 0, 0, 9], [0, 0, 0, 0], [2, 2, 2, 2]]


def run(backend, counts, dtype):
    torch.manual_seed(1)
    experts = SwigluExperts(4, 16, 24, backend=backend).to(dtype)
    rows = torch.randn(sum(counts), 16).to(dtype).requires_grad_()
    out = experts(rows, torch.tensor(counts))
    out.sum().backward()
    return [out.detach(), rows.grad, *(parameter.grad for parameter in experts.parameters())]


@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_backends_agree_forward_and_backward(counts, dtype, tolerance):
    fast = run("grouped_mm", counts, dtype)
    slow = run("loop", counts, torch.float64)
    for got, expected in zip(fast, slow, strict=True):
        scale = max(1.0, float(expected.abs().max())) if expected.numel() else 1.0
        torch.testing.assert_close(got.double() / scale, expected / scale, atol=tolerance, rtol=tolerance)


def test_gradcheck_of_the_reference():
    weights = [torch.randn(3, 4, 5), torch.randn(3, 4, 5), torch.randn(3, 5, 4)]
    weights = [weight.double().requires_grad_() for weight in weights]
    rows = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    counts = torch.tensor([2, 0, 4])
    assert torch.autograd.gradcheck(lambda x, *w: swiglu_loop(x, counts, w), (rows, *weights))


def test_list_equals_stack_and_leaves_idle_experts_alone():
    torch.manual_seed(0)
    stack = SwigluExperts(3, 8, 12).double()
    modules = [SwigluFfn(8, 12).double() for _ in range(3)]
    with torch.no_grad():
        for index, module in enumerate(modules):
            module.w1.weight.copy_(stack.w1_EDF[index].t())
            module.w3.weight.copy_(stack.w3_EDF[index].t())
            module.w2.weight.copy_(stack.w2_EFD[index].t())
    experts = ExpertList(modules)
    rows, counts = torch.randn(7, 8, dtype=torch.float64), torch.tensor([3, 0, 4])
    torch.testing.assert_close(experts(rows, counts), stack(rows, counts))
    experts(rows, counts).sum().backward()
    assert all(parameter.grad is None for parameter in modules[1].parameters())
    assert all(parameter.grad is not None for parameter in modules[2].parameters())


def test_residual_stack_is_zero_at_first_and_adds_up_later():
    stack = ResidualFfnStack(8, 16, 3)
    x = torch.randn(5, 8)
    assert torch.equal(stack(x), torch.zeros(5, 8))
    torch.manual_seed(0)
    for outer in stack.outer:
        torch.nn.init.normal_(outer.weight)
    expected = x
    for norm, inner, outer in zip(stack.norms, stack.inner, stack.outer, strict=True):
        expected = expected + outer(torch.relu(inner(norm(expected))))
    torch.testing.assert_close(x + stack(x), expected)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: SwigluExperts(3, 8, 8)(torch.zeros(4, 8), torch.tensor([2, 2])), r"allowed: \(3,\)"),
        (lambda: SwigluExperts(2, 8, 8)(torch.zeros(5, 8), torch.tensor([2, 2])), "5 rows for counts that sum to 4"),
        (lambda: SwigluExperts(2, 8, 8, backend="cutlass"), "auto, loop, grouped_mm"),
        (
            lambda: SwigluExperts(1, 8, 8, backend="grouped_mm").double()(
                torch.zeros(2, 8).double(), torch.tensor([2])
            ),
            'use backend="loop"',
        ),
    ],
)
def test_bad_rows_are_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call()
