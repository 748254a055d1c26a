"""Skill modules: every task declares its skills, and only their modules are active.

Shapes: T tokens, E skills, D model width.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from moe_kernels.errors import MoeError
from moe_kernels.experts import ExpertList, SwigluFfn
from moe_kernels.layers.routed import RoutedLayer
from moe_kernels.types import Routing, TokenInfo


class SkillRouter(nn.Module):
    """Sends each token to all skills of its task, ``info.domain_T``, with equal weights that sum to 1.

    Args:
        is_active: For every task, for every skill, whether the task uses it.
    """

    def __init__(self, is_active: Sequence[Sequence[bool]]) -> None:
        super().__init__()
        self.register_buffer("is_active", torch.tensor(is_active, dtype=torch.bool), persistent=False)

    is_active: torch.Tensor

    def forward(self, x_TD: torch.Tensor, info: TokenInfo) -> Routing:
        """Route by ``info.domain_T``, the id of the task."""
        num_tasks, num_experts = self.is_active.shape
        task_T = info.need("domain_T", x_TD.shape[0], num_tasks).to(x_TD.device)
        is_real_T = info.real(x_TD.shape[0], x_TD.device)
        active_TE = self.is_active[task_T] & is_real_T.unsqueeze(1)
        token_N, expert_N = active_TE.nonzero(as_tuple=True)
        return Routing(
            token_N=token_N,
            expert_N=expert_N,
            weight_N=active_TE.sum(1)[token_N].to(x_TD.dtype).reciprocal(),
            num_tokens=x_TD.shape[0],
            num_experts=num_experts,
            is_real_T=is_real_T,
        )


class SkillLayer(RoutedLayer):
    """Feed-forward modules by skill (SkillNet, Dai et al. 2022, https://arxiv.org/abs/2205.06126).

    The outputs of a token's active modules are averaged. Modules of skills that no token uses get no gradient.

    Args:
        skills: Names of the skills.
        tasks: Skills of every task, in the order of task ids.
        experts: One network per skill.
        width: Model width D.

    Raises:
        MoeError: If a task has no skill or one that is not in ``skills``.
    """

    def __init__(
        self, skills: Sequence[str], tasks: Mapping[str, Sequence[str]], experts: Sequence[nn.Module], *, width: int
    ) -> None:
        for task, used in tasks.items():
            if not used or not set(used) <= set(skills):
                got = ", ".join(used) or "none"
                remedy = "declare the skill or correct the task"
                raise MoeError(f"skills of task {task}", got=got, allowed=", ".join(skills), remedy=remedy)
        router = SkillRouter([[skill in used for skill in skills] for used in tasks.values()])
        super().__init__(router, ExpertList(experts), width=width)
        self.skills, self.task_ids = tuple(skills), {task: index for index, task in enumerate(tasks)}


@dataclass(frozen=True, kw_only=True)
class SkillConfig:
    """A layer of SwiGLU networks, one per skill."""

    width: int
    """Model width D."""
    hidden_width: int
    """Feed-forward width F of each skill."""
    skills: tuple[str, ...]
    """Names of the skills."""
    tasks: Mapping[str, tuple[str, ...]]
    """Skills of every task; the order gives the task ids."""

    def build(self) -> SkillLayer:
        """Build the layer.

        Returns:
            The layer, in training mode.
        """
        experts = [SwigluFfn(self.width, self.hidden_width) for _ in self.skills]
        return SkillLayer(self.skills, self.tasks, experts, width=self.width)
