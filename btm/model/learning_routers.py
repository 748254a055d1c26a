"""Layers whose choice looks at a whole batch in training, together with the routers that learn to foresee it.

The auxiliary routers of MoMa (https://arxiv.org/abs/2407.21770, section 2.4) decide at inference by each token alone.
Here their loss is reported with every training pass. Its gradient reaches nothing but these routers, so they can learn
beside the model, or after it with all else frozen.
"""

import dataclasses

import torch

from moe_kernels import LayerOutput, TokenInfo
from moe_kernels.layers import MixtureOfDepths, ModalityConfig, ModalityLayer

ROUTER_LOSS, DEPTH_LOSS = "auxiliary", "depth_auxiliary"


class LearningModalityLayer(ModalityLayer):
    """A modality-aware layer that reports the loss of its auxiliary routers in training."""

    def forward(self, x: torch.Tensor, info: TokenInfo | None = None) -> LayerOutput:
        """Apply the layer to states ``(..., D)``."""
        output = super().forward(x, info)
        if not self.training or self.router.inference != "auxiliary":
            return output
        loss, _ = self.router.auxiliary_loss(x.reshape(-1, self.width), info or TokenInfo())
        return _with_loss(output, ROUTER_LOSS, loss)


class LearningDepths(MixtureOfDepths):
    """A mixture of depths that reports the loss of its auxiliary router in training."""

    def forward(self, x: torch.Tensor, info: TokenInfo | None = None) -> LayerOutput:
        """Apply the layer to the tokens that pass; states ``(..., D)``."""
        output = super().forward(x, info)
        if not self.training or self.inference != "auxiliary":
            return output
        loss, _ = self.auxiliary_loss(x, info)
        return _with_loss(output, DEPTH_LOSS, loss)


def learning_modality_layer(config: ModalityConfig) -> LearningModalityLayer:
    """The layer that ``config`` describes, with its auxiliary routers learning beside it.

    Args:
        config: Widths and groups.
    """
    built = config.build()
    return LearningModalityLayer(built.router, built.experts, width=config.width)


def freeze_except_auxiliary(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    """Freeze everything but the auxiliary routers.

    Args:
        model: A model with modality-aware layers.

    Returns:
        The parameters left to train; none where the model has no auxiliary routers.
    """
    model.requires_grad_(False)
    routers = [m.router.auxiliary for m in model.modules() if isinstance(m, ModalityLayer)]
    routers += [m.auxiliary for m in model.modules() if isinstance(m, MixtureOfDepths)]
    return [parameter for router in routers for parameter in router.requires_grad_(True).parameters()]


def _with_loss(output: LayerOutput, name: str, loss: torch.Tensor) -> LayerOutput:
    return dataclasses.replace(output, losses={**output.losses, name: loss})
