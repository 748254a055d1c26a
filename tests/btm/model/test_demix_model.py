"""DEMix models: domains come and go, and what is frozen stays to the last bit."""

import pytest
import torch

from btm.config_ffn import FfnConfig
from btm.errors import ConfigError, ForestError
from btm.model.causal_lm import load_model, save_model
from btm.model.demix import (
    add_domain,
    best_domain,
    dense_of_domain,
    domain_losses,
    freeze_except,
    posterior_losses,
    remove_domain,
)
from btm.model.expert_block import expert_modules
from btm.model.expert_pass import EXPERTS, ExpertPass
from btm.model.loss import token_losses
from btm.model.sparse_lm import add_experts, sparsity_of

IDS = torch.randint(0, 300, (2, 20), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def model(make_model):
    return add_experts(make_model(), FfnConfig(layer="demix", initial="random"), ["ants", "bees"], seed=2).eval()


def logits(model, domain: int) -> torch.Tensor:
    return model(input_ids=IDS, **{EXPERTS: ExpertPass(domain=torch.full((2,), domain))}).logits


def test_one_domain_is_the_dense_model(make_model):
    dense = make_model().eval()
    model = add_experts(make_model(), FfnConfig(layer="demix"), ["ants"], seed=2).eval()
    assert torch.equal(logits(model, 0), dense(input_ids=IDS).logits)


def test_the_dense_model_of_a_domain_shares_all_tensors(model):
    dense = dense_of_domain(model, "bees")
    assert torch.equal(dense(input_ids=IDS).logits, logits(model, 1))
    storages = {parameter.data_ptr() for parameter in model.parameters()}
    assert {parameter.data_ptr() for parameter in dense.parameters()} <= storages
    assert sparsity_of(dense) is None
    generated = dense.generate(IDS[:1, :4], max_new_tokens=3, do_sample=False)
    assert generated.shape == (1, 7)


def test_a_new_domain_starts_as_the_one_it_is_like_and_leaves_the_others_alone(model, tmp_path):
    before = [logits(model, 0), logits(model, 1)]
    add_domain(model, "cats", like="bees")
    assert torch.equal(logits(model, 2), before[1])
    trained = freeze_except(model, "cats")
    assert len(trained) == 2 * 3
    with torch.no_grad():
        for parameter in trained:
            parameter.add_(0.1)
    save_model(model, tmp_path / "model", torch.float32)
    loaded = load_model(tmp_path / "model")
    assert [torch.equal(logits(loaded, number), before[number]) for number in (0, 1)] == [True, True]
    assert not torch.equal(logits(loaded, 2), before[1])
    assert sparsity_of(loaded).domains == ("ants", "bees", "cats")


def test_a_removed_domain_is_gone_and_the_rest_stays(model):
    before = logits(model, 1)
    count = sum(parameter.numel() for parameter in model.parameters())
    remove_domain(model, "ants")
    assert torch.equal(logits(model, 0), before)
    assert sum(parameter.numel() for parameter in model.parameters()) < count
    with pytest.raises(ConfigError, match="'ants' is not among those of the model: bees"):
        dense_of_domain(model, "ants")
    with pytest.raises(ConfigError, match="last one"):
        remove_domain(model, "bees")


def test_an_unknown_domain_is_inferred_from_what_was_read(model):
    """The losses of a sequence sum to those of the mixture of the domains' sequence models, exactly."""
    targets = IDS.roll(-1, 1)
    losses = domain_losses(model, IDS, targets)
    assert torch.equal(losses[1], token_losses(dense_of_domain(model, "bees"), IDS, targets))
    mixed = posterior_losses(losses)
    expected = torch.logsumexp(-losses.sum(2) - torch.log(torch.tensor(2.0)), dim=0)
    torch.testing.assert_close(-mixed.sum(1), expected)
    known = torch.tensor([0.0, -torch.inf])
    torch.testing.assert_close(posterior_losses(losses, known), losses[0])


def test_the_best_domain_is_the_one_that_generated_the_text(model):
    dense = dense_of_domain(model, "bees")
    with torch.no_grad():
        for module in expert_modules(model):
            for parameter in module.layer.experts.experts[1].parameters():
                parameter.mul_(8.0)
    text = dense.generate(IDS[:, :1], max_new_tokens=60, do_sample=False, eos_token_id=None)
    assert best_domain(model, text[:, :-1], text[:, 1:]) == "bees"


def test_names_are_checked(model, make_model):
    with pytest.raises(ConfigError, match="already"):
        add_domain(model, "bees", like="ants")
    with pytest.raises(ConfigError, match="not among"):
        add_domain(model, "cats", like="dogs")
    with pytest.raises(ForestError, match="cannot be a name"):
        add_domain(model, "../x", like="ants")
    with pytest.raises(ConfigError, match="a dense model"):
        freeze_except(make_model(), "ants")
