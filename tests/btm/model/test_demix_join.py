"""Experts that were trained in a model of their own join another one."""

import copy

import pytest
import torch

from btm.config_ffn import FfnConfig
from btm.errors import ConfigError, ForestError
from btm.model.demix import (
    add_domain,
    best_domain,
    dense_of_domain,
    domain_losses,
    freeze_except,
    join_domain,
    posterior_sums,
    remove_domain,
)
from btm.model.sparse_lm import add_experts, sparsity_of

IDS = torch.randint(0, 300, (4, 20), generator=torch.Generator().manual_seed(3))


@pytest.fixture
def model(make_model):
    return add_experts(make_model(), FfnConfig(layer="demix", initial="random"), ["ants", "bees"], seed=2).eval()


@pytest.fixture
def alone(model):
    """Trained experts of one more domain, beside the same shared weights and no others."""
    other = copy.deepcopy(model)
    add_domain(other, "cats", like="bees")
    remove_domain(other, "ants")
    remove_domain(other, "bees")
    with torch.no_grad():
        for parameter in freeze_except(other, "cats"):
            parameter.add_(0.1)
    return other


def test_joined_experts_are_those_that_were_trained_and_the_others_stay(model, alone):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    join_domain(model, alone, "cats")
    assert sparsity_of(model).domains == ("ants", "bees", "cats")
    after = model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    ids = {"input_ids": IDS}
    trained = dense_of_domain(alone, "cats")(**ids).logits
    assert torch.equal(dense_of_domain(model, "cats")(**ids).logits, trained)
    assert not torch.equal(dense_of_domain(model, "bees")(**ids).logits, trained)


def test_experts_trained_beside_other_weights_are_refused(model, alone):
    with torch.no_grad():
        alone.get_input_embeddings().weight[0, 0] += 1
    with pytest.raises(ForestError, match="trained beside other weights than the model has"):
        join_domain(model, alone, "cats")
    assert sparsity_of(model).domains == ("ants", "bees")


def test_unknown_and_present_domains_are_refused(model, alone):
    with pytest.raises(ConfigError, match="domain 'dogs' is not among"):
        join_domain(model, alone, "dogs")
    with pytest.raises(ConfigError, match="has experts of domain 'bees' already"):
        join_domain(model, copy.deepcopy(model), "bees")


def test_posteriors_add_up_over_batches_as_over_one_token_after_the_other(model):
    inputs, targets = IDS[:, :-1], IDS[:, 1:].clone()
    targets[0, 5:] = -100
    whole = posterior_sums(model, inputs, targets)
    parts = posterior_sums(model, inputs[:1], targets[:1]) + posterior_sums(model, inputs[1:], targets[1:])
    torch.testing.assert_close(whole, parts, rtol=1e-5, atol=1e-6)
    losses = domain_losses(model, inputs, targets).double()
    slow = torch.zeros(2, dtype=torch.float64)
    for row in range(4):
        for position in range(19):
            if targets[row, position] != -100:
                slow += torch.softmax(-losses[:, row, :position].sum(1), 0)
    torch.testing.assert_close(whole, slow)
    assert float(whole.sum()) == pytest.approx(int((targets != -100).sum()))
    assert best_domain(model, inputs, targets) == ("ants", "bees")[int(slow.argmax())]
