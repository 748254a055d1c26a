"""Sparse models: a transformers causal LM in which some blocks have expert layers. Built, described, saved and loaded.

On disk a sparse model is a directory with ``config.json`` (the dense model's config, ``model_type`` ``btm_sparse``, and
what was put in under ``btm``), one ``model.safetensors`` and the tokenizer. transformers alone refuses it; what it can
hold is exported by :mod:`btm.model.export` and :mod:`btm.model.demix`.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from btm.config_ffn import FfnConfig, FfnLayer, Initial, Placement, copies_per_token
from btm.errors import CheckpointError, ConfigError
from btm.files import write_json
from btm.model.expert_block import ExpertLayerModule, NoFeedForward, expert_modules, make_expert_block, supply_pass
from btm.model.expert_layers import DenseNetwork, build_layer
from btm.model.learning_routers import auxiliary_routers, matmul_weights
from btm.model.loss import LINEAR_HEADS
from btm.schema import Model
from moe_kernels.layers import MixtureOfDepths

MODEL_TYPE = "btm_sparse"
_WEIGHTS = "model.safetensors"
_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
_TRANSIENT = ("balance.before_E", "balance.current_E")
"""Buffers that are zero between updates."""
_SEED_STRIDE = 1_000_003


class SparseDescription(Model):
    """What ``config.json`` says under ``btm``."""

    dense_model_type: str
    """``model_type`` of the dense model."""
    dense_architectures: list[str]
    ffn: FfnConfig
    """As given, with ``initial``, ``placement`` and ``layers`` resolved."""
    domains: list[str] = []
    """Names of the domains, in the order of their ids."""


@dataclass(frozen=True, slots=True)
class Sparsity:
    """What a model in memory is made of."""

    ffn: FfnConfig
    domains: tuple[str, ...]

    def domain_id(self, domain: str) -> int:
        """Id of a domain.

        Raises:
            ConfigError: If the model does not know it.
        """
        if domain not in self.domains:
            raise ConfigError([f"domain {domain!r} is not among those of the model: {', '.join(self.domains)}"])
        return self.domains.index(domain)


def sparsity_of(model: nn.Module) -> Sparsity | None:
    """What expert layers ``model`` has; None for a dense model."""
    return getattr(model, "btm_sparsity", None)


def add_experts(
    model: PreTrainedModel,
    ffn: FfnConfig,
    domains: Sequence[str] = (),
    *,
    seed: int,
    is_pretrained: bool = False,
) -> PreTrainedModel:
    """Put expert layers into a dense model, in place.

    The random weights depend on ``seed`` and the number of the block alone.

    Args:
        model: A causal LM with gated SiLU feed-forward networks, in fp32 on the CPU.
        ffn: Which layers, and where.
        domains: Names of the domains in the order of their ids; DEMix layers have an expert for each.
        seed: Root of the random weights.
        is_pretrained: Whether the weights of ``model`` are worth keeping, which decides what is null in ``ffn``.

    Returns:
        ``model``.

    Raises:
        ConfigError: If the architecture or the sizes do not allow it.
    """
    if not ffn.is_sparse:
        return model
    _check_model(model, ffn, domains)
    ffn = _resolved(ffn, model, is_pretrained)
    blocks: Any = model.base_model.layers
    deviation = float(getattr(model.config, "initializer_range", 0.02))
    with torch.random.fork_rng(devices=[]):
        for place, number in enumerate(ffn.blocks(len(blocks))):
            torch.manual_seed(seed * _SEED_STRIDE + number)
            dense = DenseNetwork(blocks[number].mlp, model.config, deviation)
            module = ExpertLayerModule(build_layer(ffn, dense, len(domains), place=place), number)
            module.train(model.training)
            if ffn.layer is not FfnLayer.base:
                make_expert_block(blocks[number], mlp=module)
            elif ffn.placement is Placement.inserted:
                make_expert_block(blocks[number], behind=module)
            else:
                make_expert_block(blocks[number], mlp=NoFeedForward(), behind=module)
    describe(model, ffn, domains)
    model.base_model.register_forward_pre_hook(supply_pass, with_kwargs=True)
    return model


def describe(model: PreTrainedModel, ffn: FfnConfig, domains: Sequence[str]) -> None:
    """Write into a model in memory what it is made of."""
    base: Any = model.base_model
    base.modality_starts = tuple(ffn.modality_starts) if ffn.layer is FfnLayer.modality else None
    base.needs_domain = ffn.layer is FfnLayer.demix
    cast(Any, model).btm_sparsity = Sparsity(ffn, tuple(domains))


def inactive_matmul_weights(model: nn.Module) -> int:
    """Weights that a token does not meet in training, on average over the tokens: experts, idle auxiliary routers."""
    sparsity = sparsity_of(model)
    if sparsity is None:
        return 0
    unused = 0.0
    for module in expert_modules(model):
        weights = sum(parameter.numel() for parameter in module.experts.parameters() if parameter.ndim >= 2)
        share = copies_per_token(sparsity.ffn) / module.experts.num_experts
        if isinstance(module.layer, MixtureOfDepths):
            share *= module.layer.keep_fraction
        unused += weights * (1 - share)
    is_learning = sparsity.ffn.auxiliary_weight > 0
    idle = auxiliary_routers(model, with_choice=False) if is_learning else auxiliary_routers(model)
    return round(unused) + sum(matmul_weights(router) for router in idle)


def kept_buffers(model: nn.Module) -> dict[str, torch.Tensor]:
    """Buffers that belong to a trained model as its parameters do, by their names in ``model.state_dict()``."""
    buffers = dict(model.named_buffers())
    return {
        name: tensor for name, tensor in model.state_dict().items() if name in buffers and not name.endswith(_TRANSIENT)
    }


def is_sparse_directory(directory: Path) -> bool:
    """Whether ``directory`` holds a sparse model."""
    try:
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and config.get("model_type") == MODEL_TYPE


def write_sparse(model: PreTrainedModel, folder: Path, state: dict[str, torch.Tensor]) -> None:
    """Write config and weights into a folder.

    Args:
        model: A sparse model.
        folder: Existing directory.
        state: Its tensors in the type to store, by their names in ``model.state_dict()``.
    """
    sparsity = sparsity_of(model)
    assert sparsity is not None
    raw = json.loads(model.config.to_json_string(use_diff=False))
    description = SparseDescription(
        dense_model_type=model.config.model_type,
        dense_architectures=[type(model).__name__],
        ffn=sparsity.ffn,
        domains=list(sparsity.domains),
    )
    config = raw | {"model_type": MODEL_TYPE, "architectures": None, "btm": description.model_dump(mode="json")}
    config.pop("_name_or_path", None)
    write_json(folder / "config.json", config)
    if model.generation_config is not None:
        model.generation_config.save_pretrained(folder)
    save_file(_without_ties(model, state), folder / _WEIGHTS, metadata={"format": "pt"})


def read_sparse(folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    """Read what :func:`write_sparse` wrote.

    Args:
        folder: The directory.
        dtype: Type of the weights in memory.

    Returns:
        The model on the CPU, in evaluation mode.

    Raises:
        CheckpointError: If config and weights are damaged or do not belong together.
    """
    raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    try:
        description = SparseDescription.model_validate(raw.pop("btm", None))
    except ValidationError as error:
        raise CheckpointError(
            f"{folder}/config.json does not describe a sparse model of this version: {error.errors()[0]['msg']}; "
            f"restore it from a copy"
        ) from None
    raw |= {"model_type": description.dense_model_type, "architectures": description.dense_architectures}
    config = AutoConfig.for_model(raw.pop("model_type"), **raw)
    with torch.random.fork_rng(devices=[]):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    # Everything in the description is resolved, so what the weights start from decides nothing.
    add_experts(model, description.ffn, description.domains, seed=0)
    _fill(model, folder)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model.eval()


def _fill(model: PreTrainedModel, folder: Path) -> None:
    try:
        found = load_file(folder / _WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{folder / _WEIGHTS} cannot be read ({error}); restore it from a copy") from None
    wanted = _without_ties(model, model.state_dict())
    differing = sorted(
        name
        for name in wanted.keys() | found.keys()
        if name not in wanted or name not in found or wanted[name].shape != found[name].shape
    )
    if differing:
        raise CheckpointError(
            f"{folder} has {len(differing)} tensors that its config does not fit ({', '.join(differing[:3])}); "
            f"config.json and the weights belong to different models: restore both from one copy"
        )
    with torch.no_grad():
        for name, tensor in wanted.items():
            tensor.copy_(found[name])


def _without_ties(model: PreTrainedModel, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Each tensor once, by its first name, and none that is always zero between updates; buffers in their own type."""
    parameters = {name for name, _ in model.named_parameters()}
    kept = kept_buffers(model)
    return {
        name: kept.get(name, tensor).contiguous()
        for name, tensor in state.items()
        if name in parameters or name in kept
    }


def _resolved(ffn: FfnConfig, model: PreTrainedModel, is_pretrained: bool) -> FfnConfig:
    copies = is_pretrained or ffn.layer is FfnLayer.demix
    try:
        blocks = ffn.blocks(model.config.num_hidden_layers)
    except ValueError as error:
        raise ConfigError([str(error)]) from None
    return ffn.model_copy(
        update={
            "layers": blocks,
            "initial": ffn.initial or (Initial.copy_dense if copies else Initial.random),
            "placement": ffn.placement or (Placement.inserted if is_pretrained else Placement.in_place),
        }
    )


def _check_model(model: PreTrainedModel, ffn: FfnConfig, domains: Sequence[str]) -> None:
    problems = []
    config = model.config
    layers: Any = getattr(model.base_model, "layers", None)
    networks = [getattr(block, "mlp", None) for block in layers] if layers is not None else []
    gated = all(
        network is not None and all(isinstance(getattr(network, name, None), nn.Linear) for name in _PROJECTIONS)
        for network in networks
    )
    activation = getattr(config, "hidden_act", None)
    biased = gated and any(getattr(network, name).bias is not None for network in networks for name in _PROJECTIONS)
    if config.model_type not in LINEAR_HEADS or not networks or not gated or activation != "silu" or biased:
        problems.append(
            f"ffn.layer={ffn.layer} needs a model with SwiGLU feed-forward networks without biases (llama, mistral, "
            f"qwen2, qwen3, olmo2, smollm3), got {config.model_type!r}; choose another model.arch or ffn=dense"
        )
    if sparsity_of(model) is not None:
        problems.append("the model has expert layers already; start from a dense one")
    if ffn.layer is FfnLayer.demix and len(set(domains)) != max(1, len(domains)):
        problems.append(f"ffn.layer=demix needs different domains, at least one, got {list(domains)}")
    if problems:
        raise ConfigError(problems)
