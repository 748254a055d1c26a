import pytest

from btm.config_model import ModelConfig
from btm.errors import ConfigError
from btm.model.architecture import transformers_config


def _config(**settings):
    return transformers_config(ModelConfig(**settings), vocab_size=300, eos_id=7)


@pytest.mark.parametrize("arch", ["llama", "gpt2", "opt", "gpt_neox", "qwen3", "gemma", "phi3", "bloom"])
def test_sizes_reach_every_architecture(arch):
    config = _config(arch=arch, num_layers=3, hidden_size=48, num_heads=6, num_kv_heads=6)
    assert (config.num_hidden_layers, config.hidden_size, config.num_attention_heads) == (3, 48, 6)
    assert config.vocab_size == 300
    assert config.eos_token_id == config.bos_token_id == 7
    assert getattr(config, "head_dim", None) in (None, 8)
    assert not [name for name, value in vars(config).items() if "drop" in name and isinstance(value, float) and value]


def test_sizes_left_open_follow_the_rules():
    config = _config(num_layers=4)
    assert (config.hidden_size, config.num_attention_heads, config.intermediate_size) == (256, 4, 704)


def test_extra_keys_win():
    config = _config(arch="gpt2", extra={"resid_pdrop": 0.25, "n_inner": 99})
    assert (config.resid_pdrop, config.n_inner) == (0.25, 99)


def test_unknown_architecture_names_what_was_meant():
    with pytest.raises(ConfigError, match="did you mean llama"):
        _config(arch="lama")


def test_an_architecture_that_ignores_the_sizes_is_refused():
    with pytest.raises(ConfigError, match=r"does not take|refuses"):
        _config(arch="xlnet", hidden_size=52, num_heads=5)
