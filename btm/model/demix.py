"""DEMix models: the dense model of one domain, and domains that are added and removed (arXiv 2108.05036).

Inference by the posterior over domains runs the whole network once per domain and mixes the distributions. The dense
models of all domains, which share every tensor but their experts, are the members of such a mixture, so the ensembles
of :mod:`btm.ensemble` serve it as they are.
"""

from typing import Any, cast

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from btm.config_ffn import FfnLayer
from btm.errors import ConfigError, ForestError
from btm.files import check_name
from btm.model.expert_block import ExpertLayerModule, expert_modules
from btm.model.expert_pass import ExpertPass
from btm.model.loss import IGNORED, token_losses
from btm.model.sparse_lm import Sparsity, describe, sparsity_of
from moe_kernels.layers import DemixLayer, mix_domains


def dense_of_domain(model: PreTrainedModel, domain: str) -> PreTrainedModel:
    """The dense model that a DEMix model is for the tokens of one domain.

    Args:
        model: A DEMix model.
        domain: Name of a domain.

    Returns:
        A model of the dense architecture, in the mode of ``model``. All its tensors are those of ``model``, not copies.

    Raises:
        ConfigError: If the model is not a DEMix model or does not know the domain.
    """
    number = _demix(model).domain_id(domain)
    experts = {module.block: _layer(module).experts.experts[number] for module in expert_modules(model)}
    with torch.device("meta"):
        dense = AutoModelForCausalLM.from_config(model.config, dtype=torch.float32)
    blocks: Any = dense.base_model.layers
    for block, expert in experts.items():
        blocks[block].mlp = expert
    prefix = dense.base_model_prefix
    for name, module in dense.named_modules():
        if any(name.startswith(f"{prefix}.layers.{block}.mlp") for block in experts):
            continue
        own = model.get_submodule(name)
        module._parameters = dict(own._parameters)
        module._buffers = dict(own._buffers)
    dense.generation_config = model.generation_config
    return dense.train(model.training)


def domain_losses(model: PreTrainedModel, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Negative log-likelihood of every target under the experts of each domain: whole-network passes.

    Args:
        model: A DEMix model.
        inputs: int64 [B, T].
        targets: int64 [B, T]; -100 is not scored.

    Returns:
        fp32 [J, B, T] nats for the J domains, 0 where the target is -100.

    Raises:
        ConfigError: If the model is not a DEMix model.
    """
    passes = [
        ExpertPass(domain=torch.full_like(inputs[:, 0], number), is_real=targets != IGNORED)
        for number in range(len(_demix(model).domains))
    ]
    return torch.stack([token_losses(model, inputs, targets, experts=experts) for experts in passes])


def posterior_losses(losses: torch.Tensor, log_prior: torch.Tensor | None = None) -> torch.Tensor:
    """Negative log-likelihood of every target when the domain is not known but inferred from what was read.

    Args:
        losses: [J, B, T] nats, see :func:`domain_losses`.
        log_prior: Log prior of the domains [J]; None is uniform.

    Returns:
        [B, T] nats: ``-log sum_j p(j | x_<t) p_j(x_t)`` with ``p(j | x_<t)`` proportional to prior times likelihood.
    """
    prior = losses.new_zeros(len(losses)).log_softmax(0) if log_prior is None else log_prior
    return -torch.stack([mix_domains(-losses[:, row], prior) for row in range(losses.shape[1])])


def best_domain(model: PreTrainedModel, inputs: torch.Tensor, targets: torch.Tensor) -> str:
    """The domain with the largest mean posterior over all positions of some sequences, under a uniform prior.

    Args:
        model: A DEMix model.
        inputs: int64 [B, T], for example dev documents of a new domain.
        targets: int64 [B, T]; -100 is not scored.

    Raises:
        ConfigError: If the model is not a DEMix model.
    """
    return _demix(model).domains[int(posterior_sums(model, inputs, targets).argmax())]


def posterior_sums(model: PreTrainedModel, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Posterior of each domain before each target of some sequences, under a uniform prior, summed over the targets.

    Args:
        model: A DEMix model.
        inputs: int64 [B, T].
        targets: int64 [B, T]; -100 is not scored.

    Returns:
        fp64 [J]; their sum is the number of targets.

    Raises:
        ConfigError: If the model is not a DEMix model.
    """
    losses = domain_losses(model, inputs, targets).double()
    before = losses - losses.cumsum(2)
    return before.softmax(0)[:, targets != IGNORED].sum(1)


def add_domain(model: PreTrainedModel, domain: str, *, like: str) -> None:
    """Give a DEMix model the experts of a new domain, copies of those of another one, in place.

    Train with :func:`freeze_except` so that nothing of the other domains changes.

    Args:
        model: A DEMix model.
        domain: Name of the new domain.
        like: Domain whose experts are copied; best the one with the highest posterior on the new data.

    Raises:
        ConfigError: If the model is not a DEMix model, knows ``domain`` already or does not know ``like``.
        ForestError: If ``domain`` cannot be a name.
    """
    sparsity = _demix(model)
    check_name(domain)
    if domain in sparsity.domains:
        raise ConfigError([f"the model has experts of domain {domain!r} already; remove them first or choose a name"])
    number = sparsity.domain_id(like)
    for module in expert_modules(model):
        _layer(module).add_domain(number)
    describe(model, sparsity.ffn, [*sparsity.domains, domain])


def remove_domain(model: PreTrainedModel, domain: str) -> None:
    """Remove the experts of a domain for good, in place; what the shared weights learnt from it stays.

    Raises:
        ConfigError: If the model is not a DEMix model, does not know the domain, or has no other one.
    """
    sparsity = _demix(model)
    number = sparsity.domain_id(domain)
    if len(sparsity.domains) == 1:
        raise ConfigError([f"domain {domain!r} is the last one of the model; add another one first"])
    for module in expert_modules(model):
        _layer(module).remove_domain(number)
    describe(model, sparsity.ffn, [name for name in sparsity.domains if name != domain])


def join_domain(model: PreTrainedModel, other: PreTrainedModel, domain: str) -> None:
    """Give a DEMix model the experts of a domain that another one has, in place; they are copied.

    Args:
        model: A DEMix model.
        other: One that shares every tensor but experts with it, as one trained with :func:`freeze_except` does.
        domain: Of ``other``, and new to ``model``.

    Raises:
        ConfigError: If one of them is not a DEMix model, ``other`` does not know the domain, or ``model`` does.
        ForestError: If a tensor that they should share differs.
    """
    number, sparsity = _demix(other).domain_id(domain), _demix(model)
    own, others = _shared(model), _shared(other)
    names = [name for name in own if name not in others or not torch.equal(own[name], others[name])]
    if names or own.keys() != others.keys():
        raise ForestError(
            f"the experts of domain {domain!r} were trained beside other weights than the model has "
            f"({len(names)} tensors differ, {', '.join(names[:3])}); train them again from this model"
        )
    add_domain(model, domain, like=sparsity.domains[0])
    for module, source in zip(expert_modules(model), expert_modules(other), strict=True):
        _layer(module).experts.experts[-1].load_state_dict(_layer(source).experts.experts[number].state_dict())


def freeze_except(model: PreTrainedModel, domain: str) -> list[nn.Parameter]:
    """Freeze everything but the experts of one domain.

    Returns:
        The parameters left to train.

    Raises:
        ConfigError: If the model is not a DEMix model or does not know the domain.
    """
    number = _demix(model).domain_id(domain)
    model.requires_grad_(False)
    experts = [_layer(module).experts.experts[number] for module in expert_modules(model)]
    return [parameter for expert in experts for parameter in expert.requires_grad_(True).parameters()]


def _shared(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Tensors of a model that belong to no expert, by name."""
    experts = {id(tensor) for module in expert_modules(model) for tensor in module.experts.parameters()}
    return {name: tensor for name, tensor in model.named_parameters() if id(tensor) not in experts}


def _demix(model: nn.Module) -> Sparsity:
    sparsity = sparsity_of(model)
    if sparsity is None or sparsity.ffn.layer is not FfnLayer.demix:
        kind = "a dense model" if sparsity is None else f"one with ffn.layer={sparsity.ffn.layer}"
        raise ConfigError([f"domains belong to DEMix models, this is {kind}; train one with ffn=demix"])
    return sparsity


def _layer(module: ExpertLayerModule) -> DemixLayer:
    return cast(DemixLayer, module.layer)
