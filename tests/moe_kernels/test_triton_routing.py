"""Triton routing equals the torch code: ids, weights, gradients, order by expert, expert choice, ties and NaN."""

import pytest
import torch

from moe_kernels import ModalityConfig, TokenInfo
from moe_kernels.layers.modality import ModalityRouter
from moe_kernels.selection import choose_in_groups, sort_copies, top_experts, top_tokens
from moe_kernels.triton_kernels.routing import route_top_k

SHAPES = [(1, 1, 1), (5, 3, 2), (70, 16, 4), (33, 17, 17), (129, 64, 8), (0, 4, 2)]


def make(num_tokens, num_experts, seed=0):
    """Scores that all differ, since torch orders equal ones as it likes."""
    order = torch.randperm(num_tokens * num_experts, generator=torch.Generator().manual_seed(seed))
    return order.view(num_tokens, num_experts) / (num_tokens * num_experts + 1) * 6 - 3


def plain_route(logits, count, score, is_renormalised):
    scores = logits.softmax(1) if score == "softmax" else logits.sigmoid()
    expert = logits.topk(count, dim=1).indices
    weight = scores.gather(1, expert)
    weight = weight / weight.sum(1, keepdim=True) if is_renormalised else weight
    return expert, weight, scores / scores.sum(1, keepdim=True)


@pytest.mark.parametrize(("num_tokens", "num_experts", "count"), SHAPES)
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("is_renormalised", [True, False])
def test_token_choice_forward_and_backward(num_tokens, num_experts, count, score, is_renormalised, triton_device):
    logits = make(num_tokens, num_experts).to(triton_device)
    fast_in, slow_in = logits.clone().requires_grad_(), logits.double().requires_grad_()
    expert, weight, probs, order = route_top_k(fast_in, count, score=score, is_renormalised=is_renormalised)
    expected = plain_route(slow_in, count, score, is_renormalised)
    assert torch.equal(expert, expected[0])
    torch.testing.assert_close(weight.double(), expected[1], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(probs.double(), expected[2], atol=1e-6, rtol=1e-5)
    upstream = [torch.randn_like(value) for value in (weight, probs)]
    (fast,) = torch.autograd.grad((weight, probs), fast_in, upstream)
    (slow,) = torch.autograd.grad(expected[1:], slow_in, [value.double() for value in upstream])
    torch.testing.assert_close(fast.double(), slow, atol=1e-6, rtol=1e-5)
    flat = expert.reshape(-1)
    assert torch.equal(order.copy_N, flat.argsort(stable=True))
    assert torch.equal(order.copy_N[order.row_N], torch.arange(flat.numel(), device=triton_device))
    assert torch.equal(order.counts_E, torch.bincount(flat, minlength=num_experts))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_short_logits(dtype, triton_device):
    logits = torch.randn(40, 8, generator=torch.Generator().manual_seed(1)).to(triton_device, dtype).requires_grad_()
    expert, weight, _, _ = route_top_k(logits, 2)
    assert torch.equal(expert, logits.float().argsort(dim=1, descending=True, stable=True)[:, :2])
    weight.sum().backward()
    assert logits.grad.dtype == dtype


@pytest.mark.parametrize("num_copies", [0, 1, 7, 700])
@pytest.mark.parametrize("num_experts", [1, 6, 130])
def test_sort_is_stable_and_has_its_inverse(num_copies, num_experts, triton_device):
    expert = torch.randint(num_experts, (num_copies,), generator=torch.Generator().manual_seed(1)).to(triton_device)
    fast = sort_copies(expert, num_experts, backend="triton")
    slow = sort_copies(expert.cpu(), num_experts, backend="torch")
    for name, value in vars(fast).items():
        assert torch.equal(value.cpu(), getattr(slow, name)), name


@pytest.mark.parametrize(("num_tokens", "num_experts"), [(1, 1), (7, 3), (100, 17), (300, 5), (2100, 2)])
@pytest.mark.parametrize("share", [0.0, 0.02, 0.3, 1.0])
def test_expert_choice(num_tokens, num_experts, share, triton_device):
    scores, capacity = make(num_tokens, num_experts), int(share * num_tokens)
    expected = scores.t().topk(capacity, dim=1).indices.sort(dim=1).values
    assert torch.equal(top_tokens(scores.to(triton_device), capacity, backend="triton").cpu(), expected)


def test_ties_go_to_the_lower_index_and_nan_counts_as_lowest(triton_device):
    scores = torch.randint(-1, 2, (90, 12), generator=torch.Generator().manual_seed(2)).float()
    scores[3, ::2] = -0.0
    scores[7], scores[9, 1], scores[11], scores[12, 3] = torch.nan, torch.nan, -torch.inf, torch.inf
    low = torch.where(scores.isnan(), -torch.inf, scores)
    on_device = scores.to(triton_device)
    expected = low.argsort(dim=1, descending=True, stable=True)[:, :4]
    assert torch.equal(top_experts(on_device, 4, backend="triton").cpu(), expected)
    best = low.argsort(dim=0, descending=True, stable=True)[:50].t().sort(dim=1).values
    assert torch.equal(top_tokens(on_device, 50, backend="triton").cpu(), best)


@pytest.mark.parametrize("num_tokens", [0, 1, 65, 200])
def test_expert_choice_in_groups(num_tokens, triton_device):
    group_E = torch.tensor([0, 0, 1, 2, 2, 2])
    group_T = torch.randint(-1, 3, (num_tokens,), generator=torch.Generator().manual_seed(3))
    scores = make(num_tokens, 6)
    capacity = torch.tensor([int((group_T == group).sum()) // 2 for group in group_E.tolist()])
    slow = choose_in_groups(scores, group_T, group_E, capacity, backend="torch")
    inputs = [value.to(triton_device) for value in (scores, group_T, group_E, capacity)]
    assert torch.equal(choose_in_groups(*inputs, backend="triton").cpu(), slow)
    assert torch.equal(slow.sum(0), capacity)
    assert not slow[group_T == -1].any()


def test_groups_of_the_modality_router_equal_a_loop():
    router = ModalityRouter(8, (2, 3, 1))
    modality = torch.randint(3, (50,), generator=torch.Generator().manual_seed(0))
    is_real = torch.arange(50) % 7 != 0
    scores = make(50, 6)
    expected = torch.zeros(50, 6, dtype=torch.bool)
    for expert, group in enumerate([0, 0, 1, 1, 1, 2]):
        members = (is_real & (modality == group)).nonzero().squeeze(1)
        expected[members[scores[members, expert].topk(max(1, len(members) // (2, 3, 1)[group])).indices], expert] = True
    assert torch.equal(router._chosen(scores, modality, is_real), expected)


def test_a_modality_without_tokens_is_left_out():
    layer = ModalityConfig(width=8, hidden_width=8, group_sizes=(2, 2)).build()
    out = layer(torch.randn(6, 8), TokenInfo(modality_T=torch.zeros(6, dtype=torch.long)))
    assert out.statistics.counts_E.tolist() == [3, 3, 0, 0]


def test_bad_values_are_refused(triton_device):
    with pytest.raises(ValueError, match="dtype of scores in Triton"):
        top_experts(make(4, 4).double().to(triton_device), 2, backend="triton")
    with pytest.raises(ValueError, match="capacity_E"):
        choose_in_groups(make(4, 1), torch.zeros(4), torch.zeros(1), torch.tensor([5]), backend="torch")
