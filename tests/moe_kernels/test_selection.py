"""Selection kernels equal torch on every shape, with ties, with what is not a number; native and torch code alike."""

import pytest
import torch

from moe_kernels.native import load_library
from moe_kernels.selection import sort_copies, top_experts, top_tokens

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
