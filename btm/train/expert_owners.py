"""The experts of a model, numbered through all its layers: whose weights are whose, whichever process holds them."""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from btm.model.expert_block import expert_modules
from btm.train.flat import Owners
from moe_kernels.expert_parallel import ExpertParallelExperts
from moe_kernels.experts import ExpertList, SwigluExperts


@dataclass(frozen=True, slots=True)
class ExpertSet:
    """The experts of one layer."""

    path: str
    """Name of their module in the model."""
    first: int
    """Number of the layer's expert 0 among all experts of the model."""
    experts: nn.Module
    """All of them, or this process's share (:class:`ExpertParallelExperts`)."""

    @property
    def local(self) -> tuple[str, nn.Module, int]:
        """Name, module and number of the first of the experts that this process holds."""
        if isinstance(self.experts, ExpertParallelExperts):
            return f"{self.path}.local", self.experts.local, self.first + self.experts.share.start
        return self.path, self.experts, self.first


def expert_sets(model: nn.Module) -> Iterator[ExpertSet]:
    """The experts of each layer of a model, by block."""
    names = {id(module): name for name, module in model.named_modules()}
    first = 0
    for module in expert_modules(model):
        experts = module.experts
        yield ExpertSet(names[id(experts)], first, experts)
        first += experts.num_experts


def num_experts(model: nn.Module) -> int:
    """Experts of all layers of a model, those of other processes included."""
    return sum(module.experts.num_experts for module in expert_modules(model))


def expert_owners(model: nn.Module) -> Owners:
    """Parameter name -> the expert that it belongs to, or those of its rows."""
    owners: dict[str, tuple[int, ...]] = {}
    for found in expert_sets(model):
        path, local, first = found.local
        if isinstance(local, ExpertList):
            for number, expert in enumerate(local.experts):
                names = [f"{path}.experts.{number}.{name}" for name, _ in expert.named_parameters()]
                owners |= dict.fromkeys(names, (first + number,))
        elif isinstance(local, SwigluExperts):
            rows = tuple(range(first, first + local.num_experts))
            owners |= {f"{path}.{name}": rows for name, _ in local.named_parameters()}
    return owners


def step_names(model: nn.Module) -> dict[str, slice | int]:
    """Name in a checkpoint -> the experts whose optimizer steps it holds; only of those that are trained.

    Args:
        model: Before its experts are divided over processes.
    """
    names: dict[str, slice | int] = {}
    for found in expert_sets(model):
        experts = found.experts
        if isinstance(experts, ExpertList):
            for number, expert in enumerate(experts.experts):
                trained = [parameter for parameter in expert.parameters() if parameter.requires_grad]
                for kind, wanted in (("matrices", True), ("vectors", False)):
                    if any((parameter.ndim >= 2) is wanted for parameter in trained):
                        names[f"{found.path}.experts.{number}.{kind}"] = found.first + number
        elif isinstance(experts, SwigluExperts) and any(parameter.requires_grad for parameter in experts.parameters()):
            names[found.path] = slice(found.first, found.first + experts.num_experts)
    return names
