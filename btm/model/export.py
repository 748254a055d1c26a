"""Token-choice models as architectures that transformers has: Mixtral, Qwen2-MoE and Qwen3-MoE.

Logits agree in fp32 to rounding. In bf16 transformers rounds the router's logits, which here are always fp32, so that
tokens on the border between two experts may take the other one.
"""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from btm.config_ffn import FfnConfig, FfnLayer, RouterName, Score, copies_per_token
from btm.errors import ConfigError
from btm.model.causal_lm import save_model
from btm.model.expert_block import expert_modules
from btm.model.sparse_lm import sparsity_of
from moe_kernels.experts import SwigluExperts, SwigluFfn

_TARGETS = {"llama": "qwen2_moe", "mistral": "qwen2_moe", "qwen2": "qwen2_moe", "qwen3": "qwen3_moe"}
_MIXTRAL_FROM = ("llama", "mistral")
_KEPT = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "head_dim", "hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps", "tie_word_embeddings",
    "rope_parameters", "attention_dropout", "bos_token_id", "eos_token_id", "pad_token_id",
)  # fmt: skip


def export_mixture(
    model: PreTrainedModel, directory: Path | str, dtype: torch.dtype, tokenizer_dir: Path | str | None = None
) -> str:
    """Write a top-k model as a Hugging Face directory that ``AutoModelForCausalLM.from_pretrained`` loads.

    A model with experts in every block and nothing else becomes a Mixtral; one with a shared network, dense blocks or
    weights that are not renormalised a Qwen2-MoE; one that comes from Qwen3 a Qwen3-MoE.

    Args:
        model: A model with ``top_k`` layers, softmax scores and no capacity; it is not changed.
        directory: Folder to write; an existing one is replaced.
        dtype: Type that the weights are stored in.
        tokenizer_dir: Folder whose tokenizer files are copied beside the weights.

    Returns:
        The ``model_type`` written.

    Raises:
        ConfigError: If transformers has no architecture that computes the same.
    """
    exported = as_transformers_mixture(model)
    save_model(exported, directory, dtype, tokenizer_dir)
    return exported.config.model_type


def as_transformers_mixture(model: PreTrainedModel) -> PreTrainedModel:
    """The same model in an architecture of transformers, with weights of its own.

    Raises:
        ConfigError: If transformers has no such architecture.
    """
    sparsity = sparsity_of(model)
    ffn = FfnConfig() if sparsity is None else sparsity.ffn
    target = _target(model, ffn)
    blocks = {module.block: module for module in expert_modules(model)}
    values = {name: getattr(model.config, name) for name in _KEPT if hasattr(model.config, name)}
    values |= _mixture_sizes(model, ffn, target, set(blocks))
    config = AutoConfig.for_model(target, **values)
    with torch.random.fork_rng(devices=[]):
        exported = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    state = {name: tensor for name, tensor in model.state_dict().items() if ".mlp.layer." not in name}
    for block, module in blocks.items():
        state |= _block_state(f"model.layers.{block}.mlp", module.layer, target)
    if target == "qwen2_moe":
        # Where the source has no such biases.
        missing = {name: torch.zeros_like(t) for name, t in exported.state_dict().items() if name.endswith("proj.bias")}
        state = missing | state
    exported.load_state_dict(state)
    exported.generation_config = model.generation_config
    return exported.train(model.training)


def _target(model: PreTrainedModel, ffn: FfnConfig) -> str:
    source = model.config.model_type
    problems = []
    if ffn.layer is not FfnLayer.top_k or ffn.router not in (RouterName.top_k, RouterName.switch):
        problems.append(
            f"export needs ffn.layer=top_k with ffn.router=top_k or switch, got {ffn.layer} with {ffn.router}; "
            f"transformers has no such layer (of demix, export the model of one domain)"
        )
    elif ffn.score is not Score.softmax or ffn.capacity_factor is not None:
        problems.append(
            f"export needs ffn.score=softmax and no ffn.capacity_factor, got {ffn.score} and {ffn.capacity_factor}; "
            f"transformers routes without them"
        )
    if source not in _TARGETS or getattr(model.config, "attention_bias", False):
        problems.append(
            f"export knows {', '.join(_TARGETS)} without attention biases, got {source!r}; keep the directory as it is"
        )
    elif source == "qwen3" and ffn.shared_hidden_width:
        problems.append("export of qwen3 has no place for ffn.shared_hidden_width; train without it, or from qwen2")
    is_windowed = getattr(model.config, "sliding_window", None) and source != "mistral"
    if is_windowed:
        problems.append(f"export knows no sliding windows of {source!r} models; keep the directory as it is")
    if problems:
        raise ConfigError(problems)
    is_plain = not ffn.shared_hidden_width and ffn.router is RouterName.top_k
    is_everywhere = len(expert_modules(model)) == model.config.num_hidden_layers
    if source in _MIXTRAL_FROM and is_plain and is_everywhere:
        return "mixtral"
    if source == "mistral" and model.config.sliding_window:
        raise ConfigError(["export to Qwen2-MoE has no sliding window; set model.extra.sliding_window=null and train"])
    return _TARGETS[source]


def _mixture_sizes(model: PreTrainedModel, ffn: FfnConfig, target: str, blocks: set[int]) -> dict[str, Any]:
    experts = expert_modules(model)[0].layer.get_submodule("experts")
    assert isinstance(experts, SwigluExperts)
    width, copies = experts.w1_EDF.shape[2], copies_per_token(ffn)
    if target == "mixtral":
        return {
            "num_local_experts": ffn.num_experts,
            "num_experts_per_tok": copies,
            "intermediate_size": width,
            "sliding_window": getattr(model.config, "sliding_window", None),
        }
    sizes = {
        "num_experts": ffn.num_experts,
        "num_experts_per_tok": copies,
        "moe_intermediate_size": width,
        "norm_topk_prob": ffn.router is RouterName.top_k,
        "mlp_only_layers": sorted(set(range(model.config.num_hidden_layers)) - blocks),
    }
    if target == "qwen2_moe":
        sizes["shared_expert_intermediate_size"] = ffn.shared_hidden_width or 1
    return sizes


def _block_state(prefix: str, layer: torch.nn.Module, target: str) -> dict[str, torch.Tensor]:
    experts: Any = layer.get_submodule("experts")
    gate, up = experts.w1_EDF.detach().transpose(1, 2), experts.w3_EDF.detach().transpose(1, 2)
    state = {
        f"{prefix}.gate.weight": layer.get_parameter("router.weight_ED").detach(),
        f"{prefix}.experts.gate_up_proj": torch.cat([gate, up], dim=1),
        f"{prefix}.experts.down_proj": experts.w2_EFD.detach().transpose(1, 2),
    }
    if target != "qwen2_moe":
        return state
    width = experts.w1_EDF.shape[1]
    shared: Any = getattr(layer, "shared", None)
    zeros = {"gate": torch.zeros(1, width), "up": torch.zeros(1, width), "down": torch.zeros(width, 1)}
    if isinstance(shared, SwigluFfn):
        # Its gate there is a sigmoid: with weights of zero it halves, which the doubled matrix undoes exactly.
        zeros = {"gate": shared.w1.weight, "up": shared.w3.weight, "down": 2 * shared.w2.weight}
    state |= {f"{prefix}.shared_expert.{name}_proj.weight": weight.detach() for name, weight in zeros.items()}
    return state | {f"{prefix}.shared_expert_gate.weight": torch.zeros(1, width)}
