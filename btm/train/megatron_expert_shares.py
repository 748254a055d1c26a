"""Experts of which every process has a share: what lies where, and all of them in one model again."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from btm.train.megatron_start import Mesh
from moe_kernels.expert_parallel import ExpertParallelExperts, spread_experts


@dataclass(frozen=True, slots=True)
class ExpertShares:
    """The experts of a transformers model, spread over the expert-parallel processes of a mesh in equal shares."""

    layers: Mapping[str, ExpertParallelExperts]
    """Name of the experts of each layer in the model -> what stands there; empty where each process has all."""

    @staticmethod
    def of(model: PreTrainedModel, mesh: Mesh) -> "ExpertShares":
        """Spread the experts of ``model`` in place; the processes of ``mesh`` divide their number."""
        return ExpertShares(spread_experts(model, mesh.expert_group, loss="sum") if mesh.expert_size > 1 else {})

    def sources(self, name: str) -> tuple[str, ...]:
        """Names in the undivided model of what the processes have as the parameter ``name`` of theirs.

        One of each process for experts that are modules; a single one for stacks, of whose rows each has its share.
        Nothing for what is no expert's.
        """
        for path, experts in self.layers.items():
            if not name.startswith(f"{path}.local."):
                continue
            rest = name.removeprefix(f"{path}.local.")
            if experts.is_stack:
                return (f"{path}.{rest}",)
            head, index, tail = rest.split(".", 2)
            return tuple(f"{path}.{head}.{int(index) + share.start}.{tail}" for share in experts.shares)
        return ()

    def bring_together(self, model: PreTrainedModel, tensors: Mapping[str, torch.Tensor]) -> None:
        """Put all experts into ``model`` again.

        Args:
            model: What was spread.
            tensors: Whole weights by their names in the undivided model.
        """
        for path, experts in self.layers.items():
            prefix = f"{path}."
            state = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
            for name, parameter in experts.local.named_parameters():
                whole = state[experts.full_name(name)]
                parameter.data = whole[experts.share.start : experts.share.stop] if experts.is_stack else whole
            model.set_submodule(path, experts.undivided(state))
