"""Experts whose feed-forward width tensor-parallel processes share out (https://arxiv.org/abs/1909.08053, section 3).

Every process has the rows of all experts and a part of the hidden units of each expert; what the parts contribute to
the output is added up. Rows, counts and outputs are the same bits on all processes.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional

from btm.model.expert_block import expert_modules
from btm.train.flat import Owners
from btm.train.megatron_mapping import AXES, Cut, Entry
from btm.train.megatron_start import Mesh, imported
from moe_kernels.expert_parallel import ExpertParallelExperts
from moe_kernels.experts import ExpertList, ResidualFfnStack, check_rows
from moe_kernels.layers import MixtureOfDepths

_CUTS: Mapping[tuple[str, ...], Cut] = {
    ("w1_EDF",): Cut.units,
    ("w3_EDF",): Cut.units,
    ("w2_EFD",): Cut.columns,
    ("gate_proj", "weight"): Cut.rows,
    ("up_proj", "weight"): Cut.rows,
    ("down_proj", "weight"): Cut.columns,
}
"""Last parts of the name of a weight -> how it is shared out: stacks of experts, and networks of transformers."""
_RESIDUAL_CUTS: Mapping[tuple[str, str], Cut] = {
    ("inner", "weight"): Cut.rows,
    ("inner", "bias"): Cut.rows,
    ("outer", "weight"): Cut.columns,
}
"""The same for stacks of residual networks, around the number of the sublayer; every process has norms and the rest."""


class SharedWidth(nn.Module):
    """Experts of which every process holds a part of the hidden units.

    Args:
        local: Experts with this process's part of their weights.
        group: The processes.
    """

    def __init__(self, local: nn.Module, group: dist.ProcessGroup) -> None:
        super().__init__()
        self.local, self._group = local, group

    @property
    def num_experts(self) -> int:
        """Number of experts."""
        return self.local.num_experts  # pyright: ignore[reportReturnType]

    def forward(self, rows: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        """Apply each expert to its rows, [N, C] by expert; returns [N, C] in the same order. Collective."""
        return self._added_up(self.local(self._copied(rows), counts))

    def _copied(self, rows: torch.Tensor) -> torch.Tensor:
        """``rows``, whose gradient is the sum over the processes."""
        mappings = imported("megatron.core.tensor_parallel.mappings")
        return mappings.copy_to_tensor_model_parallel_region(rows, group=self._group)

    def _added_up(self, rows: torch.Tensor) -> torch.Tensor:
        """The sum over the processes, which all of them go on with alike."""
        mappings = imported("megatron.core.tensor_parallel.mappings")
        return mappings.reduce_from_tensor_model_parallel_region(rows, group=self._group)


class SharedWidthStacks(SharedWidth):
    """The same for experts of :class:`ResidualFfnStack`: norms, residuals and outer biases stand outside of the sums.

    All experts pass a sublayer before one of them passes the next, so that there is one sum for each sublayer.
    """

    def forward(self, rows: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        """Apply each expert to its rows, [N, C] by expert; returns [N, C] in the same order. Collective."""
        check_rows(rows, counts, self.num_experts)
        experts: Any = self.local.experts
        used = [(expert, count) for expert, count in zip(experts, counts.tolist(), strict=True) if count]
        if not used:
            return rows  # a share of the experts that got nothing; the gradient has to go back all the same
        change = torch.zeros_like(rows)
        sizes = [count for _, count in used]
        for number in range(len(used[0][0].norms)):
            parts = (rows + change).split(sizes)
            normed = torch.cat([expert.norms[number](part) for (expert, _), part in zip(used, parts, strict=True)])
            parts = self._copied(normed).split(sizes)
            pieces = []
            for (expert, _), part in zip(used, parts, strict=True):
                hidden = functional.relu(expert.inner[number](part))
                pieces.append(functional.linear(hidden, expert.outer[number].weight))
            biases = [expert.outer[number].bias.expand(count, -1) for expert, count in used]
            change = change + (self._added_up(torch.cat(pieces)) + torch.cat(biases))
        return change


def share_out_width(model: nn.Module, mesh: Mesh) -> None:
    """Put :class:`SharedWidth` in the place of all experts of ``model``, whose weights lose their values.

    Args:
        model: With expert layers; widths divide. Processes may have a share of the experts only.
        mesh: Where this process stands.
    """
    for holder, name in _places(model):
        experts = getattr(holder, name)
        for parameter_name, parameter in experts.named_parameters():
            cut = expert_cut(parameter_name)
            if cut is not Cut.copied:
                shape = list(parameter.shape)
                shape[AXES[cut]] //= mesh.tensor_size
                parameter.data = parameter.data.new_empty(shape)
        is_residual = isinstance(experts, ExpertList) and isinstance(experts.experts[0], ResidualFfnStack)
        setattr(holder, name, (SharedWidthStacks if is_residual else SharedWidth)(experts, mesh.tensor_group))


def bring_together(model: nn.Module) -> None:
    """Put the experts in the place of :class:`SharedWidth` again; their weights still have no whole values."""
    for holder, name in _places(model):
        experts = getattr(holder, name)
        if isinstance(experts, SharedWidth):
            setattr(holder, name, experts.local)


def expert_cut(name: str) -> Cut:
    """How a weight of experts is shared out, by its name in them."""
    parts = tuple(name.split("."))
    for length in (1, 2):
        if parts[-length:] in _CUTS:
            return _CUTS[parts[-length:]]
    return _RESIDUAL_CUTS.get((parts[-3], parts[-1]), Cut.copied) if len(parts) > 2 else Cut.copied


def expert_width(model: nn.Module) -> int | None:
    """Feed-forward width of one expert of ``model``; None for a dense one."""
    for module in expert_modules(model):
        for name, parameter in module.experts.named_parameters():
            cut = expert_cut(name)
            if cut is not Cut.copied:
                return parameter.shape[AXES[cut]]
    return None


def expert_entries(
    parameters: Mapping[str, nn.Parameter], sources: Mapping[str, nn.Parameter], owners: Owners
) -> tuple[Entry, ...]:
    """What the parameters of expert layers are, which Megatron's model shares with that of transformers.

    Args:
        parameters: By Megatron's names.
        sources: By Hugging Face names.
        owners: By Hugging Face names, of the parameters that experts own.
    """
    names = {id(parameter): name for name, parameter in sources.items()}
    found = [(name, names[id(parameter)]) for name, parameter in parameters.items() if id(parameter) in names]
    entries = [(name, source, expert_cut(source) if source in owners else Cut.copied) for name, source in found]
    return tuple(Entry(name, (source,), cut, is_repeated=cut is Cut.copied) for name, source, cut in entries)


def _places(model: nn.Module) -> Iterator[tuple[Any, str]]:
    """Module and attribute that hold the experts of each layer, or this process's share of them."""
    for module in expert_modules(model):
        layer: Any = module.layer
        layer = layer.layer if isinstance(layer, MixtureOfDepths) else layer
        yield (layer.experts, "local") if isinstance(layer.experts, ExpertParallelExperts) else (layer, "experts")
