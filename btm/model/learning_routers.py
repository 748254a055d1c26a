"""Layers whose choice looks at a whole batch in training, together with the routers that learn to foresee it.

The auxiliary routers of MoMa (https://arxiv.org/abs/2407.21770, section 2.4) decide at inference by each token alone.
Here their loss is reported with every training pass. Its gradient reaches nothing but these routers, so they can learn
beside the model, or after it with all else frozen.
"""

import contextlib
import dataclasses
from collections.abc import Iterator

import torch

from moe_kernels import LayerOutput, TokenInfo
from moe_kernels.layers import MixtureOfDepths, ModalityConfig, ModalityLayer
from moe_kernels.layers.modality import ModalityRouter

ROUTER_LOSS, DEPTH_LOSS = "auxiliary", "depth_auxiliary"
ROUTER_ACCURACY, DEPTH_ACCURACY = "auxiliary_accuracy", "depth_accuracy"
"""Reported among the losses and without a weight: share of the memberships that auxiliary routers predict rightly."""


class LearningModalityLayer(ModalityLayer):
    """A modality-aware layer that reports the loss of its auxiliary routers in training."""

    def forward(self, x: torch.Tensor, info: TokenInfo | None = None) -> LayerOutput:
        """Apply the layer to states ``(..., D)``."""
        output = super().forward(x, info)
        if not self.training or self.router.inference != "auxiliary" or not self.router.has_choice:
            return output
        loss, accuracy = self.router.auxiliary_loss(x.reshape(-1, self.width), info or TokenInfo())
        return _with_losses(output, {ROUTER_LOSS: loss, ROUTER_ACCURACY: accuracy})


class LearningDepths(MixtureOfDepths):
    """A mixture of depths that reports the loss of its auxiliary router in training."""

    def forward(self, x: torch.Tensor, info: TokenInfo | None = None) -> LayerOutput:
        """Apply the layer to the tokens that pass; states ``(..., D)``."""
        output = super().forward(x, info)
        if not self.training or self.inference != "auxiliary":
            return output
        loss, accuracy = self.auxiliary_loss(x, info)
        return _with_losses(output, {DEPTH_LOSS: loss, DEPTH_ACCURACY: accuracy})


def learning_modality_layer(config: ModalityConfig) -> LearningModalityLayer:
    """The layer that ``config`` describes, with its auxiliary routers learning beside it.

    Args:
        config: Widths and groups.
    """
    built = config.build()
    return LearningModalityLayer(built.router, built.experts, width=config.width)


def freeze_except_auxiliary(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    """Freeze everything but the auxiliary routers, which then learn what is chosen without noise.

    Args:
        model: A model with modality-aware layers.

    Returns:
        The parameters left to train; none where the model has no auxiliary routers that anything depends on.
    """
    model.requires_grad_(False)
    for router in _modality_routers(model):
        router.is_noisy = False
    routers = auxiliary_routers(model, with_choice=True)
    return [parameter for router in routers for parameter in router.requires_grad_(True).parameters()]


def auxiliary_routers(model: torch.nn.Module, *, with_choice: bool | None = None) -> list[torch.nn.Module]:
    """The auxiliary routers of a model.

    Args:
        model: Any model.
        with_choice: Only those that predict a choice, or only those that do not: all experts of their layer are alone
            in their group. None for all.
    """
    found: list[tuple[torch.nn.Module, bool]] = [(m.auxiliary, m.has_choice) for m in _modality_routers(model)]
    found += [(depths.auxiliary, True) for depths in _depths(model)]
    return [router for router, has_choice in found if with_choice is None or has_choice is with_choice]


def trains_auxiliary_only(model: torch.nn.Module) -> bool:
    """Whether all but auxiliary routers is frozen, so that the model runs forward only."""
    learning = {parameter for parameter in model.parameters() if parameter.requires_grad}
    own = {parameter for router in auxiliary_routers(model) for parameter in router.parameters()}
    return bool(learning) and learning <= own


def matmul_weights(module: torch.nn.Module) -> int:
    """Weights in matrices."""
    return sum(parameter.numel() for parameter in module.parameters() if parameter.ndim >= 2)


def route_as_in_training(model: torch.nn.Module) -> None:
    """Let experts and depths choose over the whole batch outside of training, too, until the model is loaded again.

    The auxiliary routers then have no part in anything, and learn nothing. What the model says of itself stays.

    Args:
        model: Any model.
    """
    for module in (*_modality_routers(model), *_depths(model)):
        module.inference = "expert_choice"


@contextlib.contextmanager
def training_routing(model: torch.nn.Module) -> Iterator[None]:
    """Route as in training for a while; see :func:`route_as_in_training`."""
    before = [(module, module.inference) for module in (*_modality_routers(model), *_depths(model))]
    route_as_in_training(model)
    try:
        yield
    finally:
        for module, inference in before:
            module.inference = inference


def _modality_routers(model: torch.nn.Module) -> list[ModalityRouter]:
    return [module for module in model.modules() if isinstance(module, ModalityRouter)]


def _depths(model: torch.nn.Module) -> list[MixtureOfDepths]:
    return [module for module in model.modules() if isinstance(module, MixtureOfDepths)]


def _with_losses(output: LayerOutput, losses: dict[str, torch.Tensor]) -> LayerOutput:
    return dataclasses.replace(output, losses={**output.losses, **losses})
