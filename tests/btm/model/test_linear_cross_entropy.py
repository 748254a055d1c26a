import math

import pytest
import torch

from btm.model import linear_cross_entropy, reference
from btm.model.linear_cross_entropy import linear_cross_entropy_rows, linear_cross_entropy_sum

# Logits are rounded to bf16: 2**-9 of their size, here at most 8.
TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 2e-2}


@pytest.fixture(params=[40 * 20, 1 << 20], ids=["many_chunks", "one_chunk"])
def chunks(request, monkeypatch):
    monkeypatch.setattr(linear_cross_entropy, "_CHUNK_ELEMENTS", request.param)


def _inputs(dtype, rows=70, width=16, vocab_size=40):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, width, generator=generator).to(dtype).requires_grad_()
    weight = (torch.randn(vocab_size, width, generator=generator) * 0.5).to(dtype).requires_grad_()
    return hidden, weight, torch.randint(0, vocab_size, (rows,), generator=generator)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_loss_and_gradients_equal_reference(path, chunks, dtype):
    hidden, weight, targets = _inputs(dtype)
    exact_hidden, exact_weight = (item.detach().double().requires_grad_() for item in (hidden, weight))
    expected = reference.linear_cross_entropy_rows(exact_hidden, exact_weight, targets)
    (expected.sum() * 0.25).backward()
    result = linear_cross_entropy_sum(hidden, weight, targets)
    assert result.dtype == torch.float32
    (result * 0.25).backward()
    torch.testing.assert_close(result.double(), expected.sum(), rtol=TOLERANCE[dtype] / 10, atol=0)
    torch.testing.assert_close(
        linear_cross_entropy_rows(hidden, weight, targets).double(),
        expected,
        rtol=TOLERANCE[dtype],
        atol=TOLERANCE[dtype],
    )
    for mine, theirs in ((hidden, exact_hidden), (weight, exact_weight)):
        scale = float(theirs.grad.abs().max())
        torch.testing.assert_close(mine.grad.double(), theirs.grad, rtol=0, atol=TOLERANCE[dtype] * scale)


def test_gradients_are_the_derivatives(chunks):
    hidden, weight, targets = _inputs(torch.float64, rows=30, width=3, vocab_size=40)
    assert torch.autograd.gradcheck(lambda h, w: linear_cross_entropy_sum(h, w, targets), (hidden, weight))


def test_extreme_logits_stay_exact(path):
    hidden = torch.tensor([[1.0], [-1.0]])
    weight = torch.tensor([[500.0], [-500.0], [0.0]])
    losses = linear_cross_entropy_rows(hidden, weight, torch.tensor([0, 0]))
    assert losses.tolist() == pytest.approx([0.0, 1000.0])


def test_nan_reaches_the_loss(path):
    hidden, weight, targets = _inputs(torch.bfloat16)
    with torch.no_grad():
        hidden[3, 2] = float("nan")
    losses = linear_cross_entropy_rows(hidden, weight, targets)
    assert losses.isnan().nonzero().flatten().tolist() == [3]
    assert math.isnan(linear_cross_entropy_sum(hidden, weight, targets).item())


def test_no_rows_cost_nothing(path):
    hidden, weight, targets = _inputs(torch.float32, rows=0)
    linear_cross_entropy_sum(hidden, weight, targets).backward()
    assert float(weight.grad.abs().sum()) == 0.0


def test_memory_stays_far_below_all_logits(path, monkeypatch):
    """The largest tensor that the loss makes is one chunk of logits, never rows x vocabulary."""
    monkeypatch.setattr(linear_cross_entropy, "_CHUNK_ELEMENTS", 1 << 12)
    largest = 0
    real = torch.mm

    def mm(left, right, **kwargs):
        nonlocal largest
        result = real(left, right, **kwargs)
        largest = max(largest, result.numel())
        return result

    monkeypatch.setattr(torch, "mm", mm)
    hidden, weight, targets = _inputs(torch.float32, rows=400, width=4, vocab_size=256)
    linear_cross_entropy_sum(hidden, weight, targets).backward()
    assert largest == 1 << 12


def test_tokens_of_another_vocabulary_are_refused():
    hidden, weight, targets = _inputs(torch.float32)
    targets[5] = 40
    with pytest.raises(ValueError, match=r"0 \.\.\. 39"):
        linear_cross_entropy_sum(hidden, weight, targets)
    with pytest.raises(ValueError, match="do not fit"):
        linear_cross_entropy_rows(hidden, weight, targets[:-1])
