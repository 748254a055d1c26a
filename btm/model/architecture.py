"""From the sizes of a run to the config of a transformers architecture."""

import difflib
from typing import Any

from transformers import CONFIG_MAPPING, AutoConfig
from transformers import PreTrainedConfig as TransformersConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from btm.budget import resolved_sizes
from btm.config_model import ModelConfig
from btm.errors import ConfigError

_OTHER_NAMES = {
    "gpt2": {"intermediate_size": ("n_inner",)},
    "opt": {"intermediate_size": ("ffn_dim",), "hidden_size": ("hidden_size", "word_embed_proj_dim")},
}


def transformers_config(config: ModelConfig, *, vocab_size: int, eos_id: int) -> TransformersConfig:
    """Translate sizes into the config of a transformers architecture.

    Args:
        config: Sizes; ``config.extra`` goes to transformers as it is and wins.
        vocab_size: Entries of the tokenizer.
        eos_id: Token that begins and ends documents.

    Raises:
        ConfigError: If transformers does not know the architecture, or its config does not take the sizes.
    """
    if config.arch not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or config.arch not in CONFIG_MAPPING:
        close = difflib.get_close_matches(config.arch, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, n=3)
        hint = f"; did you mean {', '.join(close)}?" if close else ""
        raise ConfigError([f"model.arch={config.arch!r} is not a causal LM that transformers knows{hint}"])
    sizes: dict[str, Any] = resolved_sizes(config) | {"max_position_embeddings": config.max_positions}
    values = sizes | {
        "vocab_size": vocab_size,
        "bos_token_id": eos_id,
        "eos_token_id": eos_id,
        "pad_token_id": None,
        "tie_word_embeddings": config.tie_embeddings,
    }
    try:
        result = AutoConfig.for_model(config.arch, **{**_own_names(config.arch, values), **config.extra})
    except Exception as error:
        raise ConfigError([f"model: transformers refuses this {config.arch} config: {error}"]) from error
    _check_sizes_taken(config, result, sizes)
    return result


def _own_names(arch: str, values: dict[str, Any]) -> dict[str, Any]:
    config_class = CONFIG_MAPPING[arch]
    defaults = vars(config_class())
    no_dropout = {name: 0.0 for name, value in defaults.items() if "drop" in name and isinstance(value, float)}
    values = values | no_dropout
    if "head_dim" in defaults:
        values = values | {"head_dim": values["hidden_size"] // values["num_attention_heads"]}
    other = _OTHER_NAMES.get(arch, {})
    renamed = {}
    for key, value in values.items():
        for name in other.get(key, (config_class.attribute_map.get(key, key),)):
            renamed[name] = value
    return renamed


def _check_sizes_taken(config: ModelConfig, result: TransformersConfig, sizes: dict[str, Any]) -> None:
    must_hold = ("hidden_size", "num_attention_heads", "num_hidden_layers")
    problems = [
        f"model.arch={config.arch!r} does not take {name}={sizes[name]} (its config says "
        f"{getattr(result, name, None)}); name it in model.extra, or use another architecture"
        for name in must_hold
        if name not in config.extra and getattr(result, name, None) != sizes[name]
    ]
    if problems:
        raise ConfigError(problems)
