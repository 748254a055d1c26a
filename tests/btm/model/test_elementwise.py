import pytest
import torch

from btm.model import reference
from btm.model.elementwise import rms_norm, rotary, swiglu

# A result rounded once to bf16 is within 2**-8 of the exact one, a gradient within twice that.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2**-7}


def _assert_same(fast, slow, inputs, dtype):
    """Values and gradients of ``fast`` in ``dtype`` are those of ``slow`` in fp64."""
    given = [item.to(dtype).requires_grad_() for item in inputs]
    exact = [item.detach().double().requires_grad_() for item in given]
    result, expected = fast(*given), slow(*exact)
    assert result.dtype == dtype
    direction = torch.randn(expected.shape, generator=torch.Generator().manual_seed(9)).to(dtype)
    result.backward(direction)
    expected.backward(direction.double())
    torch.testing.assert_close(result.double(), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    for mine, theirs in zip(given, exact, strict=True):
        scale = float(theirs.grad.abs().max())
        torch.testing.assert_close(mine.grad.double(), theirs.grad, rtol=0, atol=TOLERANCE[dtype] * scale)


def _random(*shape, seed=0, double=False):
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return values.double().requires_grad_() if double else values


def _tables(batch, length, width):
    angles = torch.rand(batch, length, width, generator=torch.Generator().manual_seed(5)) * 6
    return angles.cos(), angles.sin()


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_rms_norm_equals_reference(path, dtype):
    _assert_same(
        lambda x, w: rms_norm(x, w, 1e-5),
        lambda x, w: reference.rms_norm(x, w, 1e-5),
        [_random(3, 67, 37), _random(37, seed=1)],
        dtype,
    )


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_swiglu_equals_reference_even_far_out(path, dtype):
    gate = _random(5, 133)
    gate[0, :4] = torch.tensor([-200.0, 200.0, -90.0, 0.0])
    _assert_same(swiglu, reference.swiglu, [gate, _random(5, 133, seed=1)], dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("table_batch", [1, 2])
def test_rotary_equals_reference(path, dtype, table_batch):
    cos, sin = _tables(table_batch, 11, 6)
    cos, sin = cos.to(dtype), sin.to(dtype)
    _assert_same(
        lambda x: rotary(x, cos, sin),
        lambda x: reference.rotary(x, cos.double(), sin.double()),
        [_random(2, 11, 3, 6)],
        dtype,
    )


def test_gradients_are_the_derivatives():
    assert torch.autograd.gradcheck(
        lambda x, w: rms_norm(x, w, 1e-5), (_random(4, 5, double=True), _random(5, double=True))
    )
    assert torch.autograd.gradcheck(swiglu, (_random(3, 4, double=True), _random(3, 4, seed=1, double=True)))
    cos, sin = (table.double() for table in _tables(2, 3, 4))
    assert torch.autograd.gradcheck(lambda x: rotary(x, cos, sin), (_random(2, 3, 2, 4, double=True),))


def test_nan_is_not_swallowed(path):
    x = _random(4, 40)
    x[2, 7] = float("nan")
    assert rms_norm(x, torch.ones(40), 1e-5).isnan().any(dim=1).tolist() == [False, False, True, False]
    assert bool(swiglu(x, torch.ones(4, 40))[2, 7].isnan())


def test_threads_do_not_change_the_bits(path):
    grads = []
    for threads in (1, 2):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        x, weight = _random(300, 48).bfloat16().requires_grad_(), _random(48, seed=1).bfloat16().requires_grad_()
        rms_norm(x, weight, 1e-5).square().sum().backward()
        grads.append((x.grad, weight.grad))
        torch.set_num_threads(before)
    assert all(torch.equal(one, two) for one, two in zip(*grads, strict=True))


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="does not fit"):
        rms_norm(torch.ones(2, 4), torch.ones(5), 1e-5)
    with pytest.raises(ValueError, match="must be alike"):
        swiglu(torch.ones(2, 4), torch.ones(2, 3))
    with pytest.raises(ValueError, match="do not fit"):
        rotary(torch.ones(2, 3, 1, 4), torch.ones(1, 2, 4), torch.ones(1, 2, 4))
