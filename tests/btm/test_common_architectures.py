"""Architectures that a plan takes for granted are taken by transformers, others are asked about."""

import pytest

from btm.config_parse import parse_config
from btm.errors import ConfigError
from btm.model.architecture import transformers_config
from btm.session import _COMMON_ARCHITECTURES, check_architecture


@pytest.mark.parametrize("arch", _COMMON_ARCHITECTURES)
def test_a_common_architecture_takes_the_sizes_of_a_preset(arch):
    config = parse_config({"model": {"arch": arch}})
    check_architecture(config)
    assert transformers_config(config.model, vocab_size=500, eos_id=0).model_type == arch


def test_an_uncommon_architecture_is_asked_about():
    check_architecture(parse_config({"model": {"arch": "bloom"}}))
    with pytest.raises(ConfigError, match=r"model.arch='lama'.*did you mean llama"):
        check_architecture(parse_config({"model": {"arch": "lama"}}))
