"""A DEMix model as a mixture over its domains: the ensemble machinery on models that share their tensors."""

import pytest
import torch

from btm.config_ensemble import EnsembleConfig
from btm.config_ffn import FfnConfig
from btm.config_model import ModelConfig
from btm.ensemble.demix import load_demix_ensemble
from btm.errors import ConfigError, EnsembleError
from btm.model.causal_lm import build_model, save_model
from btm.model.demix import domain_losses, posterior_losses
from btm.model.sparse_lm import add_experts

IDS = torch.randint(1, 200, (2, 12), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def saved(tmp_path):
    def make(ffn: FfnConfig):
        model = build_model(
            ModelConfig(num_layers=2, hidden_size=32, num_heads=2, max_positions=64), vocab_size=200, eos_id=0, seed=1
        )
        add_experts(model, ffn, ["ants", "bees", "cats"], seed=1)
        save_model(model, tmp_path / "model", torch.float32)
        return model.eval(), tmp_path / "model"

    return make


def test_the_mixture_has_the_losses_of_the_posterior_over_domains(saved):
    model, directory = saved(FfnConfig(layer="demix", initial="random"))
    ensemble = load_demix_ensemble(directory, config=EnsembleConfig())
    logp = ensemble(input_ids=IDS).logits[:, :-1].gather(2, IDS[:, 1:, None])[..., 0]
    expected = posterior_losses(domain_losses(model, IDS[:, :-1], IDS[:, 1:]))
    torch.testing.assert_close(-logp, expected, rtol=1e-4, atol=1e-4)
    shared = {parameter.data_ptr() for parameter in ensemble.parameters()}
    assert len(shared) == len(list(model.parameters()))


def test_it_generates_with_a_cache_what_it_generates_without(saved):
    _, directory = saved(FfnConfig(layer="demix", initial="random"))
    ensemble = load_demix_ensemble(directory, config=EnsembleConfig(), prior={"ants": 0.5, "bees": 0.5, "cats": 0.0})
    options = {"max_new_tokens": 8, "do_sample": False, "attention_mask": torch.ones_like(IDS), "pad_token_id": 0}
    assert torch.equal(
        ensemble.generate(IDS, use_cache=True, **options), ensemble.generate(IDS, use_cache=False, **options)
    )


def test_models_without_domains_are_refused(saved, tmp_path):
    _, directory = saved(FfnConfig())
    with pytest.raises(EnsembleError, match="dense model"):
        load_demix_ensemble(directory, config=EnsembleConfig())
    _, directory = saved(FfnConfig(layer="top_k"))
    with pytest.raises(ConfigError, match="ffn=demix"):
        load_demix_ensemble(directory, config=EnsembleConfig())
