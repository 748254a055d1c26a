"""From a transformers model to Megatron's, in flat buffers; what Megatron cannot compute is refused first."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn
from transformers import PreTrainedModel

from btm.config_model import Dtype, EngineConfig, engine_problems, share_problems
from btm.config_train import TrainConfig
from btm.errors import ConfigError
from btm.model.expert_block import expert_modules
from btm.model.patches import prepare_for_training
from btm.train.expert_owners import expert_owners, num_experts
from btm.train.megatron_expert_shares import ExpertShares
from btm.train.megatron_expert_width import expert_entries, expert_width, share_out_width
from btm.train.megatron_experts import BlockExperts
from btm.train.megatron_flat import FlatSlice
from btm.train.megatron_gpt import GptLosses
from btm.train.megatron_mapping import Entry, entries_of, missing_names
from btm.train.megatron_shape import GptShape, check_division, frequencies_of, shape_of
from btm.train.megatron_start import Mesh
from btm.train.megatron_state import ModelState, SpreadState, WholeState

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
    problems = engine_problems(config, is_sparse=bool(expert_modules(model)), num_processes=num_processes)
    counts = {module.experts.num_experts for module in expert_modules(model)}
    problems += [problem for count in sorted(counts) for problem in share_problems(config, count)]
    if problems:
        raise ConfigError(problems)
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


@dataclass(frozen=True, slots=True)
class MegatronModel:
    """A transformers model that Megatron trains."""

    losses: GptLosses
    """Megatron's model, with the expert layers of that of transformers."""
    state: ModelState
    """All weights, by Hugging Face names."""
    shares: ExpertShares
    """What of the experts lies where."""


def build(
    model: PreTrainedModel,
    shape: GptShape,
    mesh: Mesh,
    *,
    train: TrainConfig,
    config: EngineConfig,
    device: torch.device,
) -> MegatronModel:
    """Build Megatron's model around the expert layers of ``model``, which gives its memory away.

    Args:
        model: On the CPU; its expert layers become a part of Megatron's model.
        shape: From :func:`checked_shape`.
        mesh: Where this process stands.
        train: Recipe.
        config: Arithmetic, and whether the sequence is shared out.
        device: Where to compute.
    """
    dtype = DTYPES[config.dtype]
    values = {name: parameter.detach() for name, parameter in model.named_parameters()}
    shares = ExpertShares.of(model, mesh)
    owners, num_owners = expert_owners(model), num_experts(model)
    sources = dict(model.named_parameters())
    if mesh.tensor_size > 1:
        share_out_width(model, mesh)
    losses = GptLosses(
        shape,
        mesh,
        frequencies=frequencies_of(model),
        dtype=dtype,
        device=device,
        is_sequence_parallel=config.sequence_parallel,
        is_checkpointed=train.activation_checkpointing,
        experts=BlockExperts.of(model) if num_owners else (),
    )
    parameters: dict[str, nn.Parameter] = dict(losses.gpt.named_parameters())
    of_experts = expert_entries(parameters, sources, owners)
    spread = {entry.name: names for entry in of_experts if (names := shares.sources(entry.sources[0]))}
    entries = entries_of(shape, is_sequence_parallel=config.sequence_parallel)
    entries += tuple(entry for entry in of_experts if entry.name not in spread)

    def state_of(kind: type[WholeState], entries: Sequence[Entry], mesh: Mesh) -> WholeState:
        flat = FlatSlice(
            parameters,
            entries,
            mesh,
            train=train,
            dtype=dtype,
            device=device,
            owners={entry.name: owners[entry.sources[0]] for entry in of_experts if entry.sources[0] in owners},
            num_owners=num_owners,
        )
        return kind(flat, entries, shape, mesh)

    parts = [state_of(WholeState, entries, mesh)]
    if spread:
        local = [replace(entry, sources=spread[entry.name]) for entry in of_experts if entry.name in spread]
        parts.append(state_of(SpreadState, local, mesh.of_replicas))
    state = ModelState(parts)
    state.fill(None, values.__getitem__)
    state.refresh_weights()
    used = {id(parameter) for parameter in parameters.values()}
    for parameter in model.parameters():
        if id(parameter) not in used:
            parameter.data = parameter.data.new_empty(0)
    if num_owners:
        prepare_for_training(model, device, dtype)
    return MegatronModel(losses, state, shares)
