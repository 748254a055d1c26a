import pytest
import torch
from torch.nn import functional

from btm.errors import ConfigError
from btm.model.loss import LINEAR_HEADS, loss_sum, positions_of, token_losses


def _plain_losses(model, inputs, targets):
    """What transformers itself computes, all logits at once."""
    logits = model(input_ids=inputs, use_cache=False).logits
    return functional.cross_entropy(logits.transpose(1, 2), targets, ignore_index=-100, reduction="none")


def _separate_losses(model, inputs, targets, segments):
    """Losses of packed rows, each document on its own."""
    losses = torch.zeros(targets.shape)
    for row in range(len(inputs)):
        for number in segments[row].unique().tolist():
            here = segments[row] == number
            losses[row, here] = _plain_losses(model, inputs[row : row + 1, here], targets[row : row + 1, here])[0]
    return losses


def test_positions_restart_with_each_document():
    segments = torch.tensor([[4, 4, 4, 7, 7, 4, 4], [0, 0, 0, 0, 0, 0, 1]])
    assert positions_of(segments).tolist() == [[0, 1, 2, 0, 1, 0, 1], [0, 1, 2, 3, 4, 5, 0]]


@pytest.mark.parametrize("arch", [*sorted(LINEAR_HEADS), "gemma2", "bloom", "opt"])
def test_losses_are_those_of_the_models_own_logits(make_model, tokens, arch):
    """Architectures in the table and outside: a wrong entry in LINEAR_HEADS fails here."""
    model = make_model(arch, num_kv_heads=4)
    inputs, targets = (item[:, :20] for item in tokens)
    targets = torch.where(torch.arange(20) == 7, -100, targets)
    expected = _plain_losses(model, inputs, targets)
    losses = token_losses(model, inputs, targets)
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-5)
    assert losses.dtype == torch.float32
    assert not losses.requires_grad
    assert (losses[:, 7] == 0).all()
    total = loss_sum(model, inputs, targets)
    total.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    _plain_losses(model, inputs, targets).sum().backward()
    torch.testing.assert_close(total, expected.sum(), rtol=1e-5, atol=1e-5)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("arch", ["llama", "gpt2", "mistral", "qwen3", "gpt_neox", "gemma2"])
def test_packed_documents_are_read_as_if_alone(make_model, tokens, segments, arch):
    model = make_model(arch)
    inputs, targets = tokens
    expected = _separate_losses(model.eval(), inputs, targets, segments)
    torch.testing.assert_close(token_losses(model, inputs, targets, segments), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(loss_sum(model, inputs, targets, segments), expected.sum(), rtol=1e-5, atol=0)


def test_packing_needs_positions(make_model, tokens, segments):
    with pytest.raises(ConfigError, match=r"train.packing=blocks"):
        loss_sum(make_model("bloom", num_kv_heads=4), *tokens, segments)


def test_rows_without_targets_give_zero(make_model, tokens):
    model, inputs = make_model(), tokens[0]
    nothing = torch.full_like(inputs, -100)
    assert float(token_losses(model, inputs, nothing).abs().sum()) == 0
    total = loss_sum(model, inputs, nothing)
    total.backward()
    assert float(total.detach()) == 0
