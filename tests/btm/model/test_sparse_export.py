"""Export to what transformers has: the directory loads there with the same logits."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from btm.config_ffn import FfnConfig
from btm.errors import ConfigError
from btm.model.causal_lm import load_model, save_model
from btm.model.expert_pass import EXPERTS, ExpertPass
from btm.model.export import export_mixture
from btm.model.sparse_lm import add_experts

IDS = torch.randint(0, 300, (3, 20), generator=torch.Generator().manual_seed(1))
PLAIN = {"layer": "top_k", "num_experts": 4}


@pytest.mark.parametrize(
    ("arch", "changes", "target"),
    [
        ("llama", {}, "mixtral"),
        ("mistral", {"experts_per_token": 3}, "mixtral"),
        ("llama", {"shared_hidden_width": 32}, "qwen2_moe"),
        ("llama", {"layers": "every_2"}, "qwen2_moe"),
        ("llama", {"router": "switch"}, "qwen2_moe"),
        ("qwen2", {}, "qwen2_moe"),
        ("qwen3", {"layers": [0]}, "qwen3_moe"),
    ],
)
def test_transformers_loads_what_is_exported_with_the_same_logits(make_model, tmp_path, arch, changes, target):
    model = add_experts(make_model(arch), FfnConfig(**(PLAIN | changes)), seed=2).eval()
    with torch.no_grad():
        # Routers that are sure of themselves, and biases that are not zero.
        for name, parameter in model.named_parameters():
            if "router" in name or name.endswith("bias"):
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)))
    expected = model(input_ids=IDS).logits
    assert export_mixture(model, tmp_path / "exported", torch.float32) == target
    loaded, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "exported", dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert loaded.config.model_type == target
    torch.testing.assert_close(loaded(input_ids=IDS).logits, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(load_model(tmp_path / "exported")(input_ids=IDS).logits, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("domain", ["ants", "bees"])
def test_the_dense_model_of_a_domain_joins_a_forest_with_the_same_logits(make_model, tmp_path, domain):
    model = add_experts(make_model(), FfnConfig(layer="demix", initial="random"), ["ants", "bees"], seed=2).eval()
    number = torch.full((3,), ["ants", "bees"].index(domain))
    expected = model(input_ids=IDS, **{EXPERTS: ExpertPass(domain=number)}).logits
    save_model(model, tmp_path / "sparse", torch.float32)
    save_model(load_model(tmp_path / "sparse", domain=domain), tmp_path / "dense", torch.float32)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.float32)
    assert loaded.config.model_type == "llama"
    assert torch.equal(loaded(input_ids=IDS).logits, expected)
    reference = make_model()
    assert [name for name, _ in loaded.named_parameters()] == [name for name, _ in reference.named_parameters()]


@pytest.mark.parametrize(
    ("arch", "changes", "words"),
    [
        ("llama", {"layer": "demix"}, "model of one domain"),
        ("llama", {"score": "sigmoid"}, "softmax"),
        ("llama", {"capacity_factor": 1.0}, "capacity_factor"),
        ("llama", {"router": "expert_choice"}, "router=top_k"),
        ("olmo2", {}, "got 'olmo2'"),
        ("qwen3", {"shared_hidden_width": 32}, "shared_hidden_width"),
    ],
)
def test_what_transformers_cannot_hold_is_refused(make_model, tmp_path, arch, changes, words):
    model = add_experts(make_model(arch), FfnConfig(**(PLAIN | changes)), ["ants"], seed=2)
    with pytest.raises(ConfigError, match=words):
        export_mixture(model, tmp_path / "exported", torch.float32)
    assert not (tmp_path / "exported").exists()
