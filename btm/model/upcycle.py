"""Upcycling: from one expert per modality to several that begin as its copies (https://arxiv.org/abs/2407.21770)."""

from typing import Any, cast

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from btm.config_ffn import FfnConfig, FfnLayer, Initial
from btm.errors import CheckpointError
from btm.model.expert_block import ExpertLayerModule, expert_modules
from btm.model.sparse_lm import add_experts, sparsity_of
from moe_kernels.experts import SwigluExperts
from moe_kernels.layers import MixtureOfDepths, ModalityLayer


def upcycle(seed: PreTrainedModel, ffn: FfnConfig, *, random_seed: int) -> PreTrainedModel:
    """A model with several experts of each modality, all copies of the one that ``seed`` has; its routers are random.

    Everything else is that of ``seed``. Because experts are now weighed by scores and a token may meet none or
    several, the model does not begin with the loss of ``seed``, unless every group has one expert again.

    Args:
        seed: A model of ``ffn=modality`` with one expert in each group, in fp32 on the CPU; it is not changed.
        ffn: The expert layers wanted, in the same blocks.
        random_seed: Root of the random weights.

    Returns:
        The new model.

    Raises:
        CheckpointError: If ``seed`` has no such layers, or the modalities, the blocks or the widths differ.
    """
    old = _check(seed, ffn)
    with torch.random.fork_rng(devices=[]):
        model = cast(PreTrainedModel, AutoModelForCausalLM.from_config(seed.config, dtype=torch.float32))
    model.generation_config = seed.generation_config
    wanted = ffn.model_copy(update={"modality_starts": old.ffn.modality_starts, "initial": Initial.random})
    add_experts(model, wanted, old.domains, seed=random_seed)
    pairs = list(zip(expert_modules(seed), expert_modules(model), strict=False))
    if [module.block for module in expert_modules(seed)] != [module.block for module in expert_modules(model)]:
        raise CheckpointError(
            f"the seed of the upcycling has expert layers in blocks {[m.block for m in expert_modules(seed)]}, asked "
            f"are {[m.block for m in expert_modules(model)]}; ask for the same ffn.layers"
        )
    _copy_shared(seed, model)
    for before, after in pairs:
        _copy_experts(before, after)
    return model.train(seed.training)


def _check(seed: PreTrainedModel, ffn: FfnConfig) -> Any:
    old = sparsity_of(seed)
    if old is None or old.ffn.layer is not FfnLayer.modality or set(old.ffn.group_sizes) != {1}:
        found = "a dense model" if old is None else f"ffn={old.ffn.layer} with groups of {old.ffn.group_sizes}"
        raise CheckpointError(
            f"upcycling begins with one expert per modality, got {found}; train a seed with ffn=modality "
            f"ffn.group_sizes={[1] * len(ffn.group_sizes)}"
        )
    if len(old.ffn.group_sizes) != len(ffn.group_sizes):
        raise CheckpointError(
            f"the seed of the upcycling has {len(old.ffn.group_sizes)} modalities, ffn.group_sizes={ffn.group_sizes} "
            f"asks for {len(ffn.group_sizes)}; give as many groups as the seed has"
        )
    return old


@torch.no_grad()
def _copy_shared(seed: PreTrainedModel, model: PreTrainedModel) -> None:
    """All tensors outside of the expert layers."""
    inside = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, ExpertLayerModule))
    found = seed.state_dict()
    for name, tensor in model.state_dict().items():
        if not name.startswith(inside):
            tensor.copy_(found[name])


def _copy_experts(before: ExpertLayerModule, after: ExpertLayerModule) -> None:
    old, new = _layer(before), _layer(after)
    experts = old.experts
    assert isinstance(experts, SwigluExperts)
    assert isinstance(new.experts, SwigluExperts)
    if experts.w1_EDF.shape[1:] != new.experts.w1_EDF.shape[1:]:
        raise CheckpointError(
            f"experts of the seed have width {experts.w1_EDF.shape[2]}, asked are {new.experts.w1_EDF.shape[2]}; "
            "leave ffn.hidden_width as the seed has it"
        )
    new.upcycle({m: (experts.w1_EDF[m], experts.w3_EDF[m], experts.w2_EFD[m]) for m in range(experts.num_experts)})


def _layer(module: ExpertLayerModule) -> ModalityLayer:
    layer: nn.Module = module.layer.layer if isinstance(module.layer, MixtureOfDepths) else module.layer
    assert isinstance(layer, ModalityLayer)
    return layer
