import pytest
import torch

from btm.model import reference
from btm.model.attention import causal_attention

# Probabilities and their gradients are rounded to bf16 before they are multiplied.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-2}


def _inputs(length, *, heads=4, groups=4, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(2, heads, length, 8), (2, groups, length, 8), (2, groups, length, 8)]
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]


def _documents(length):
    return torch.arange(length).expand(2, length) // 37


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("length", "groups"), [(1, 4), (63, 2), (150, 4), (300, 1)])
def test_attention_equals_reference(path, dtype, packed, length, groups):
    given = _inputs(length, groups=groups, dtype=dtype)
    exact = [item.detach().double().requires_grad_() for item in given]
    segments = _documents(length) if packed else None
    result = causal_attention(*given, scaling=0.35, segments=segments)
    expected = reference.causal_attention(*exact, scaling=0.35, segments=segments)
    direction = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    result.backward(direction)
    expected.backward(direction.double())
    torch.testing.assert_close(result.double(), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    for mine, theirs in zip(given, exact, strict=True):
        scale = max(1.0, float(theirs.grad.abs().max()))
        torch.testing.assert_close(mine.grad.double(), theirs.grad, rtol=0, atol=TOLERANCE[dtype] * scale)


@pytest.mark.parametrize("packed", [False, True])
def test_gradients_are_the_derivatives(packed):
    segments = torch.tensor([[0, 0, 1, 1, 1], [0, 0, 0, 0, 2]]) if packed else None
    assert torch.autograd.gradcheck(
        lambda q, k, v: causal_attention(q, k, v, scaling=0.5, segments=segments), _inputs(5, heads=2, groups=1)
    )


def test_gradients_over_several_blocks_are_the_derivatives():
    inputs = [item[:1, :1, :, :2].detach().requires_grad_() for item in _inputs(130, heads=1, groups=1)]
    assert torch.autograd.gradcheck(lambda q, k, v: causal_attention(q, k, v, scaling=0.5), inputs, fast_mode=True)


def test_nothing_comes_from_the_future_or_from_other_documents(path):
    query, key, value = (item.detach() for item in _inputs(150, dtype=torch.float32))
    segments = _documents(150)
    before = causal_attention(query, key, value, scaling=0.35, segments=segments)
    key[:, :, 100:], value[:, :, 100:] = 7.0, -3.0
    key[:, :, :74], value[:, :, :74] = -5.0, 9.0
    after = causal_attention(query, key, value, scaling=0.35, segments=segments)
    assert torch.equal(before[:, 74:100], after[:, 74:100])
    assert not torch.equal(before[:, 100:], after[:, 100:])


def test_runs_are_bit_identical(path):
    results = []
    for _ in range(2):
        inputs = _inputs(200, dtype=torch.bfloat16)
        causal_attention(*inputs, scaling=0.35).square().sum().backward()
        results.append([item.grad for item in inputs])
    assert all(torch.equal(one, two) for one, two in zip(*results, strict=True))


def test_nan_is_not_swallowed(path):
    query, key, value = (item.detach() for item in _inputs(70, dtype=torch.float32))
    query[0, 0, 5, 0] = float("nan")
    result = causal_attention(query, key, value, scaling=0.35)
    assert bool(result[0, 5, 0].isnan().all())
    assert int(result.isnan().sum()) == result.shape[-1]


def test_shapes_that_do_not_fit_are_refused():
    query, key, value = _inputs(9)
    with pytest.raises(ValueError, match="do not fit query"):
        causal_attention(query, key[:, :, :8], value, scaling=1.0)
    with pytest.raises(ValueError, match="segments must be"):
        causal_attention(query, key, value, scaling=1.0, segments=torch.zeros(2, 8, dtype=torch.int32))
