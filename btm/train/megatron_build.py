"""From a transformers model to Megatron's, in flat buffers; what Megatron cannot compute is refused first."""

import torch
from torch import nn
from transformers import PreTrainedModel

from btm.config_model import Dtype, EngineConfig
from btm.config_train import TrainConfig
from btm.errors import ConfigError
from btm.model.expert_block import expert_modules
from btm.model.patches import prepare_for_training
from btm.train.expert_owners import expert_owners, num_experts
from btm.train.megatron_expert_width import expert_entries, expert_width, share_out_width
from btm.train.megatron_experts import BlockExperts
from btm.train.megatron_flat import FlatSlice
from btm.train.megatron_gpt import GptLosses
from btm.train.megatron_mapping import entries_of, missing_names
from btm.train.megatron_shape import GptShape, check_division, frequencies_of, shape_of
from btm.train.megatron_start import Mesh
from btm.train.megatron_state import WholeState

DTYPES = {Dtype.bf16: torch.bfloat16, Dtype.fp32: torch.float32}


def checked_shape(model: PreTrainedModel, train: TrainConfig, config: EngineConfig, num_processes: int) -> GptShape:
    """The shape of ``model``.

    Args:
        model: A transformers causal LM.
        train: Recipe.
        config: How many processes share out a layer.
        num_processes: All of them.

    Raises:
        ConfigError: If Megatron cannot compute this model, or its sizes do not divide.
    """
    shape = shape_of(model, sequence_length=train.sequence_length)
    if num_processes % config.tensor_parallel:
        raise ConfigError(
            [f"engine.tensor_parallel={config.tensor_parallel} must divide the {num_processes} processes that run this "
             f"model; set engine.num_processes to a multiple of it"]
        )  # fmt: skip
    check_division(
        shape,
        config.tensor_parallel,
        is_sequence_parallel=config.sequence_parallel,
        sequence_length=train.sequence_length,
        expert_width=expert_width(model),
    )
    of_experts = {id(parameter) for module in expert_modules(model) for parameter in module.parameters()}
    names = {name: None for name, parameter in model.named_parameters() if id(parameter) not in of_experts}
    unknown = missing_names(entries_of(shape), names)
    if unknown:
        raise ConfigError(
            [f"engine=megatron does not know what {unknown[0]} of this {model.config.model_type} model is; "
             f"use engine=torch"]
        )  # fmt: skip
    return shape


def build(
    model: PreTrainedModel,
    shape: GptShape,
    mesh: Mesh,
    *,
    train: TrainConfig,
    config: EngineConfig,
    device: torch.device,
) -> tuple[GptLosses, WholeState]:
    """Build Megatron's model around the expert layers of ``model``, which gives its memory away.

    Args:
        model: On the CPU; its expert layers become a part of Megatron's model.
        shape: From :func:`checked_shape`.
        mesh: Where this process stands.
        train: Recipe.
        config: Arithmetic, and whether the sequence is shared out.
        device: Where to compute.

    Returns:
        Megatron's model, and the way to its weights by Hugging Face names.
    """
    sources = dict(model.named_parameters())
    values = {name: parameter.detach() for name, parameter in sources.items()}
    owners, num_owners = expert_owners(model), num_experts(model)
    if mesh.tensor_size > 1:
        share_out_width(model, mesh)
    losses = GptLosses(
        shape,
        mesh,
        frequencies=frequencies_of(model),
        dtype=DTYPES[config.dtype],
        device=device,
        is_sequence_parallel=config.sequence_parallel,
        is_checkpointed=train.activation_checkpointing,
        experts=BlockExperts.of(model) if num_owners else (),
    )
    parameters: dict[str, nn.Parameter] = dict(losses.gpt.named_parameters())
    entries = entries_of(shape, is_sequence_parallel=config.sequence_parallel)
    entries += expert_entries(parameters, sources, owners)
    flat = FlatSlice(
        parameters,
        entries,
        mesh,
        train=train,
        dtype=DTYPES[config.dtype],
        device=device,
        owners={entry.name: owners[entry.sources[0]] for entry in entries if entry.sources[0] in owners},
        num_owners=num_owners,
    )
    whole = WholeState(flat, entries, shape, mesh)
    whole.fill_masters(values)
    shared = {id(parameter) for parameter in parameters.values()}
    for parameter in sources.values():
        if id(parameter) not in shared:
            parameter.data = parameter.data.new_empty(0)
    if num_owners:
        prepare_for_training(model, device, DTYPES[config.dtype])
    return losses, whole
