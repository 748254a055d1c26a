"""From a block's feed-forward network to the expert layer that takes its place; one builder per kind of layer."""

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from btm.config_ffn import Balance, FfnConfig, FfnLayer, Initial, copies_per_token, expert_width
from btm.errors import ConfigError
from btm.model.learning_routers import LearningDepths, learning_modality_layer
from moe_kernels import BaseConfig, ModalityConfig, TopKConfig
from moe_kernels.experts import ResidualFfnStack, SwigluExperts, SwigluFfn
from moe_kernels.layers import DemixLayer


@dataclass(frozen=True, slots=True)
class DenseNetwork:
    """The gated feed-forward network that gives way."""

    module: nn.Module
    """With ``gate_proj``, ``up_proj`` and ``down_proj``."""
    config: object
    """The model's config, which the module shares."""
    deviation: float
    """Standard deviation of the architecture's random weights."""

    @property
    def width(self) -> int:
        """Model width."""
        return self.weight("down_proj").shape[0]

    @property
    def hidden_width(self) -> int:
        """Feed-forward width."""
        return self.weight("down_proj").shape[1]

    def weight(self, name: str) -> torch.Tensor:
        """Weight of one of its three projections, [out, in]."""
        return self.module.get_parameter(f"{name}.weight").detach()

    def copy(self) -> nn.Module:
        """The same network with weights of its own."""
        return copy.deepcopy(self.module, {id(self.config): self.config})


def build_layer(ffn: FfnConfig, dense: DenseNetwork, num_domains: int, *, place: int) -> nn.Module:
    """The expert layer of one block.

    Args:
        ffn: With ``initial`` and ``placement`` resolved.
        dense: Feed-forward network of the block.
        num_domains: Experts of a DEMix layer.
        place: Number of the layer among the expert layers of the model, from 0.

    Returns:
        A layer of :mod:`moe_kernels` whose random weights come from torch's global generator.

    Raises:
        ConfigError: If widths do not fit.
    """
    layer = _BUILDERS[ffn.layer](ffn, dense, num_domains)
    if ffn.depth_fraction is None or place % 2:
        return layer
    depths = LearningDepths(layer, width=dense.width, keep_fraction=ffn.depth_fraction, inference=ffn.inference.value)
    _draw(depths.auxiliary, dense.deviation)
    nn.init.normal_(depths.weight_1D, std=dense.deviation)
    return depths


def _top_k(ffn: FfnConfig, dense: DenseNetwork, num_domains: int) -> nn.Module:
    del num_domains
    layer = TopKConfig(
        width=dense.width,
        hidden_width=expert_width(ffn, dense.hidden_width),
        num_experts=ffn.num_experts,
        router=ffn.router.value,
        experts_per_token=copies_per_token(ffn),
        score=ffn.score.value,
        capacity_factor=ffn.capacity_factor,
        shared_hidden_width=ffn.shared_hidden_width,
        is_globally_balanced=ffn.balance is Balance.globally,
        backend=ffn.backend,
    ).build()
    _draw(layer, dense.deviation)
    if ffn.initial is Initial.copy_dense:
        _copy_slices(layer.experts, layer.shared, dense)
    return layer


def _demix(ffn: FfnConfig, dense: DenseNetwork, num_domains: int) -> nn.Module:
    if ffn.hidden_width not in (None, dense.hidden_width):
        raise ConfigError(
            [
                f"ffn.hidden_width of demix must be the dense network's ({dense.hidden_width}), got "
                f"{ffn.hidden_width}; leave it null and set model.intermediate_size"
            ]
        )
    experts = [dense.copy() for _ in range(num_domains)]
    if ffn.initial is Initial.random:
        for expert in experts:
            _draw(expert, dense.deviation)
    return DemixLayer(experts, width=dense.width)


def _base(ffn: FfnConfig, dense: DenseNetwork, num_domains: int) -> nn.Module:
    del num_domains
    layer = BaseConfig(
        width=dense.width,
        hidden_width=expert_width(ffn, dense.hidden_width),
        num_experts=ffn.num_experts,
        num_sublayers=ffn.num_sublayers,
        assignment=ffn.assignment.value,
        is_priced=ffn.is_priced,
    ).build()
    # The outer matrices stay zero: the layer starts as the identity.
    for stack in (module for module in layer.modules() if isinstance(module, ResidualFfnStack)):
        for inner in stack.inner:
            nn.init.normal_(inner.weight, std=dense.deviation)  # pyright: ignore[reportArgumentType]
            nn.init.zeros_(inner.bias)  # pyright: ignore[reportArgumentType]
    return layer


def _modality(ffn: FfnConfig, dense: DenseNetwork, num_domains: int) -> nn.Module:
    del num_domains
    config = ModalityConfig(
        width=dense.width,
        hidden_width=expert_width(ffn, dense.hidden_width),
        group_sizes=tuple(ffn.group_sizes),
        is_noisy=bool(ffn.is_noisy),
        inference=ffn.inference.value,
        backend=ffn.backend,
    )
    layer = learning_modality_layer(config)
    _draw(layer, dense.deviation)
    if ffn.initial is Initial.copy_dense:
        _copy_slices(layer.experts, None, dense)
    return layer


def _draw(module: nn.Module, deviation: float) -> None:
    """Draw all weights as the architecture draws its own; biases are zero."""
    for parameter in module.parameters():
        if parameter.ndim >= 2:
            nn.init.normal_(parameter, std=deviation)
        else:
            nn.init.zeros_(parameter)


@torch.no_grad()
def _copy_slices(experts: nn.Module, shared: nn.Module | None, dense: DenseNetwork) -> None:
    """Fill experts from the dense network: copies where widths agree, else slices of its hidden units in turn.

    With n slices the output of each counts n-fold, so that combine weights that sum to 1 give the dense network's
    output where a token meets every slice alike; with copies they always do.
    """
    gate, up, down = (dense.weight(name) for name in ("gate_proj", "up_proj", "down_proj"))
    taken = 0
    if isinstance(shared, SwigluFfn):
        taken = shared.w1.weight.shape[0]
        for linear, weight in ((shared.w1, gate[:taken]), (shared.w3, up[:taken]), (shared.w2, down[:, :taken])):
            linear.weight.copy_(weight)
    assert isinstance(experts, SwigluExperts)
    width = experts.w1_EDF.shape[2]
    num_slices = (dense.hidden_width - taken) // width
    if not num_slices:
        raise ConfigError(
            [
                f"ffn.initial=copy: experts of width {width} are wider than what the dense network "
                f"({dense.hidden_width}) has to copy; set ffn.hidden_width lower, or ffn.initial=random"
            ]
        )
    for expert in range(experts.num_experts):
        begin = taken + expert % num_slices * width
        units = slice(begin, begin + width)
        experts.w1_EDF[expert].copy_(gate[units].t())
        experts.w3_EDF[expert].copy_(up[units].t())
        experts.w2_EFD[expert].copy_(down[:, units].t() * num_slices)


_BUILDERS: dict[FfnLayer, Callable[[FfnConfig, DenseNetwork, int], nn.Module]] = {
    FfnLayer.top_k: _top_k,
    FfnLayer.demix: _demix,
    FfnLayer.base: _base,
    FfnLayer.modality: _modality,
}
