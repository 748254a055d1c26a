"""Gradients of expert layers that arrive all at once, in the same order on every process.

Which experts a pass reaches, and so which parameters get a gradient and when, differs between processes. A library that
exchanges gradients while they arrive needs the same ones in the same order everywhere: here all parameters of a layer
pass through one node of the graph, whose backward gives zeros to those that nothing reached. Autograd runs nodes in the
reverse order of their making, so this node, and every other one, has the same place among the nodes outside of layers.
"""

import functools

import torch
from torch import nn
from torch.func import functional_call

from btm.model.expert_block import ExpertLayerModule, expert_modules


class _Join(torch.autograd.Function):
    """Aliases of parameters, behind an anchor that ties a graph to this node."""

    @staticmethod
    def forward(ctx, *parameters: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return parameters[0].new_zeros(()), *(parameter.view_as(parameter) for parameter in parameters)

    @staticmethod
    def backward(ctx, *gradients: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return gradients[1:]


class _Tie(torch.autograd.Function):
    """States as they are, with a gradient of zero for the anchor."""

    @staticmethod
    def forward(ctx, states: torch.Tensor, anchor: torch.Tensor) -> torch.Tensor:
        ctx.anchor = anchor.dtype
        return states.view_as(states)

    @staticmethod
    def backward(ctx, *gradients: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return gradients[0], gradients[0].new_zeros((), dtype=ctx.anchor)


def join_gradients(model: nn.Module) -> None:
    """Let the gradients of each expert layer of ``model`` arrive together, all of them in every backward."""
    for module in expert_modules(model):
        module.__dict__["forward"] = functools.partial(_forward, module)


def _forward(module: ExpertLayerModule, hidden_states: torch.Tensor) -> torch.Tensor:
    plain = type(module).forward
    trained = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
    if not trained or not torch.is_grad_enabled():
        return plain(module, hidden_states)
    anchor, *aliases = _Join.apply(*trained.values())
    called = _Plain(module)
    states = functional_call(
        called, {f"module.{name}": alias for name, alias in zip(trained, aliases, strict=True)}, (hidden_states,)
    )
    return _Tie.apply(states, anchor)


class _Plain(nn.Module):
    """Calls a module by its class's own forward."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return type(self.module).forward(self.module, hidden_states)
