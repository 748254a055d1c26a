"""Selection kernels equal torch on every shape, with ties, with what is not a number; native and torch code alike."""

import pytest
import torch

from moe_kernels.native import load_library
from moe_kernels.selection import sort_copies, top_experts, top_tokens, weighted_experts

SHAPES = [(1, 1), (1, 40), (5, 3), (33, 16), (100, 17), (64, 32), (257, 64), (1000, 128), (3000, 31), (9000, 96)]


@pytest.fixture(params=[True, False], ids=["native", "torch"])
def is_native(request, monkeypatch):
    monkeypatch.setenv("MOE_KERNELS_NATIVE", "1" if request.param else "0")
    load_library.cache_clear()
    yield request.param
    load_library.cache_clear()


def make(num_tokens, num_experts, seed=0):
    """Scores that all differ, since torch orders equal ones as it likes."""
    order = torch.randperm(num_tokens * num_experts, generator=torch.Generator().manual_seed(seed))
    return order.view(num_tokens, num_experts) / 1024 - 300


@pytest.mark.parametrize(
    ("num_tokens", "num_experts", "count"),
    [(*shape, k) for shape in SHAPES for k in (1, 2, 8, 16, 40) if k <= shape[1]],
)
def test_top_experts_equal_torch(num_tokens, num_experts, count, is_native):
    scores = make(num_tokens, num_experts)
    assert torch.equal(top_experts(scores, count), scores.topk(count, dim=1).indices)


@pytest.mark.parametrize(("num_tokens", "num_experts"), SHAPES)
@pytest.mark.parametrize("share", [0.0, 0.02, 0.3, 1.0])
def test_top_tokens_equal_torch(num_tokens, num_experts, share, is_native):
    scores, capacity = make(num_tokens, num_experts), int(share * num_tokens)
    scores[:, 0] = torch.arange(num_tokens).sort(descending=True).values  # a sorted column misleads any sample
    expected = scores.t().topk(capacity, dim=1).indices.sort(dim=1).values
    assert torch.equal(top_tokens(scores, capacity), expected)


@pytest.mark.parametrize("num_copies", [0, 1, 7, 5000])
@pytest.mark.parametrize("num_experts", [1, 6, 300])
def test_sort_is_stable_and_has_its_inverse(num_copies, num_experts, is_native):
    expert = torch.randint(num_experts, (num_copies,), generator=torch.Generator().manual_seed(1))
    order = sort_copies(expert, num_experts)
    assert torch.equal(order.copy_N, expert.argsort(stable=True))
    assert torch.equal(order.copy_N[order.row_N], torch.arange(num_copies))
    assert torch.equal(order.counts_E, torch.bincount(expert, minlength=num_experts))


@pytest.mark.parametrize("num_experts", [5, 64])
def test_native_ties_go_to_the_lower_index_and_nan_counts_as_lowest(num_experts):
    scores = torch.randint(0, 3, (500, num_experts), generator=torch.Generator().manual_seed(2)).float()
    scores[7] = torch.nan
    scores[9, 1] = torch.nan
    scores[11] = -torch.inf
    scores[12, 3] = torch.inf
    low = torch.where(scores.isnan(), -torch.inf, scores)
    assert torch.equal(top_experts(scores, 4), low.argsort(dim=1, descending=True, stable=True)[:, :4])
    best = low.argsort(dim=0, descending=True, stable=True)[:60].t().sort(dim=1).values
    assert torch.equal(top_tokens(scores, 60), best)


def hostile(kind, num_tokens, num_experts):
    """Columns that mislead a guess from every few rows, or leave nothing to tell tokens apart."""
    scores = make(num_tokens, num_experts)
    token = torch.arange(num_tokens).float().unsqueeze(1)
    if kind == "best rows are sampled":
        scores[:: (num_tokens // 1024) | 1] += 1e6
    elif kind == "best rows are not sampled":
        scores += 1e6 * (token % 2)
    elif kind == "ascending":
        scores = token.expand_as(scores) + 0.0
    elif kind == "ties":
        scores = (scores / 40).round()
    elif kind == "equal":
        scores = torch.zeros_like(scores)
    elif kind == "signed zeros":
        scores = torch.where(scores < 0, -0.0, 0.0)
    elif kind == "infinite":
        scores[::3], scores[1::3] = torch.inf, -torch.inf
    elif kind == "not a number":
        scores[scores < scores.median()] = torch.nan
    return scores


@pytest.mark.parametrize("kind", [
    "best rows are sampled", "best rows are not sampled", "ascending", "ties", "equal", "signed zeros", "infinite",
    "not a number",
])  # fmt: skip
@pytest.mark.parametrize(("num_tokens", "num_experts"), [(700, 8), (9000, 24), (6000, 70)])
def test_native_top_tokens_are_the_first_best_on_hostile_columns(kind, num_tokens, num_experts):
    scores = hostile(kind, num_tokens, num_experts)
    low = torch.where(scores.isnan(), -torch.inf, scores)
    order_TE = low.argsort(dim=0, descending=True, stable=True)
    for capacity in (1, num_tokens // num_experts, num_tokens // 2, num_tokens):
        assert torch.equal(top_tokens(scores, capacity), order_TE[:capacity].t().sort(dim=1).values)


def test_native_selection_does_not_depend_on_the_number_of_threads():
    scores, before = make(20000, 48), torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            expert, weight = weighted_experts(scores / 1000, 6)
            order = sort_copies(expert.reshape(-1), 48)
            results.append((expert, weight, order.copy_N, order.row_N, order.counts_E, top_tokens(scores, 400)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize(("num_tokens", "num_experts", "count"), [(1, 1, 1), (300, 8, 2), (1000, 64, 8), (70, 130, 20)])
def test_weights_equal_torch_forward_and_backward(num_tokens, num_experts, count, is_native):
    logits = (make(num_tokens, num_experts) / 50).requires_grad_()
    upstream = torch.randn(num_tokens, count, generator=torch.Generator().manual_seed(3))
    expert, weight = weighted_experts(logits, count)
    chosen = logits.topk(count, dim=1).values.softmax(1)
    assert torch.equal(expert, logits.topk(count, dim=1).indices)
    torch.testing.assert_close(weight, chosen, atol=1e-6, rtol=1e-5)
    got, expected = (torch.autograd.grad(value, logits, upstream)[0] for value in (weight, chosen))
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-5)


def test_weights_of_extreme_logits_equal_torch():
    logits = torch.tensor([[0.0, -200.0, -86.5, 3.0], [torch.inf, 0, 1, 2], [-torch.inf, 1, 2, -3e38], [torch.nan] * 4])
    weight = weighted_experts(logits, 4)[1]
    torch.testing.assert_close(weight, logits.topk(4, dim=1).values.softmax(1), equal_nan=True)


def test_gradcheck_of_the_weights():
    logits = (make(9, 7).double() / 10).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: weighted_experts(x, 3)[1], logits)


def test_half_precision_takes_the_native_code_and_gives_the_same():
    scores = make(3000, 40)
    for dtype in (torch.bfloat16, torch.float16):
        rounded = (scores / 300).to(dtype)
        assert torch.equal(top_experts(rounded, 5), top_experts(rounded.float(), 5))
        assert torch.equal(top_tokens(rounded, 77), top_tokens(rounded.float(), 77))


def test_other_dtypes_and_strides_work():
    scores = make(64, 20)
    assert torch.equal(top_experts(scores.double(), 3), top_experts(scores, 3))
    assert torch.equal(top_experts(scores.t(), 3), scores.t().topk(3, dim=1).indices)
    assert torch.equal(top_tokens(scores.t(), 3), scores.topk(3, dim=1).indices.sort(dim=1).values)
    assert torch.equal(sort_copies(torch.arange(40)[::4] % 3, 3).counts_E, torch.bincount(torch.arange(40)[::4] % 3))


def test_bad_values_are_refused():
    with pytest.raises(ValueError, match="experts_per_token: got 5"):
        top_experts(make(4, 4), 5)
    with pytest.raises(ValueError, match="capacity: got 9"):
        top_tokens(make(4, 4), 9)
    with pytest.raises(ValueError, match="expert ids: got 4"):
        sort_copies(torch.tensor([0, 4]), 4)
