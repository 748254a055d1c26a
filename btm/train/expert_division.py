"""Expert parallelism of an engine: a process trains its share of the experts, and tokens travel to them.

Gradients are those of the sum of the losses of all tokens, as in a single process: all-to-all brings an expert the
tokens of its group, and the sum over the processes that hold the same experts those of the other groups.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from btm.train.divided_tensor import DividedTensor
from btm.train.expert_ranks import ExpertRanks, check_division
from btm.train.flat import FlatParameters
from btm.train.ranks import Ranks
from btm.train.tensor_file import Tensors
from moe_kernels.expert_parallel import ExpertParallelExperts, spread_experts


@dataclass(frozen=True, slots=True)
class ExpertDivision:
    """A model whose experts are divided over processes."""

    ranks: ExpertRanks
    layers: Mapping[str, ExpertParallelExperts]
    """Name of the experts of each layer in the model -> what stands there."""
    shapes: Mapping[str, torch.Size]
    """Of every parameter of all experts, by its name in the undivided model."""

    @staticmethod
    def of(model: PreTrainedModel, ranks: Ranks, expert_parallel: int) -> "ExpertDivision | None":
        """Divide the experts of ``model`` in place; every process calls it. None where there is nothing to divide.

        Raises:
            ConfigError: If ``expert_parallel`` does not divide the number of processes.
        """
        check_division(expert_parallel, ranks.size)
        if expert_parallel == 1:
            return None
        before = {name: parameter.shape for name, parameter in model.named_parameters()}
        groups = ExpertRanks.of(ranks, expert_parallel)
        layers = spread_experts(model, groups.group, loss="sum", allows_empty=True)
        shapes = {name: shape for name, shape in before.items() if any(name.startswith(f"{path}.") for path in layers)}
        return ExpertDivision(groups, layers, shapes)

    @property
    def local_names(self) -> dict[str, str]:
        """Name in the undivided model -> name of the parameter, or of its rows, in this process."""
        return {
            f"{path}.{experts.full_name(name)}": f"{path}.local.{name}"
            for path, experts in self.layers.items()
            for name, _ in experts.local.named_parameters()
        }

    def reduce(self, flat: FlatParameters) -> torch.Tensor:
        """Sum the gradients over all processes; returns the sum of the squares of all, each expert's once, fp64.

        Every process calls it, and gets the same bits.
        """
        self.ranks.sum_over_replicas_(flat.gradients[: flat.num_local])
        squares = flat.gradient_squares()
        local = squares[:1] * float(self.ranks.is_first)
        return squares[1] + self.ranks.ranks.sum_(local)[0]

    def undivided(self, own: Mapping[str, torch.Tensor]) -> Tensors:
        """Tensors by their names in the undivided model, those of experts divided.

        Args:
            own: This process's tensors, by the names of its parameters.
        """
        local_names = self.local_names
        taken = set(local_names.values())
        common = {name: tensor for name, tensor in own.items() if name not in taken}
        return common | {name: self._divided(name, own.get(local_names.get(name, ""))) for name in self.shapes}

    def restore(self, model: PreTrainedModel, dtype: torch.dtype) -> None:
        """Put all experts into ``model`` again on the main process, tensor by tensor; every process calls it.

        Args:
            model: Its parameters are the weights of forward and backward.
            dtype: To hold the experts in; they stay on the CPU.
        """
        local_names = self.local_names
        for path, experts in self.layers.items():
            state = {}
            for name in (name for name in self.shapes if name.startswith(f"{path}.")):
                own = model.get_parameter(local_names[name]).detach().float() if name in local_names else None
                tensor = self._divided(name, own)
                if self.ranks.ranks.is_main:
                    state[name.removeprefix(f"{path}.")] = tensor.whole().to(dtype)
                else:
                    tensor.contribute()
            if state:
                model.set_submodule(path, experts.undivided(state))

    def own_rows(self, name: str, whole: torch.Tensor) -> torch.Tensor | None:
        """This process's part of a tensor of the undivided model; None where it has none."""
        divided = self._divided(name, None)
        rows = divided.rows[divided.index]
        return whole[rows.start : rows.stop] if rows else None

    def _divided(self, name: str, own: torch.Tensor | None) -> DividedTensor:
        path = next(path for path in self.layers if name.startswith(f"{path}."))
        experts, shape = self.layers[path], self.shapes[name]
        rows = tuple(experts.shares)
        if not experts.is_stack:
            number = int(name.removeprefix(f"{path}.").split(".")[1])
            rows = tuple(range(shape[0]) if number in share else range(0) for share in experts.shares)
        return DividedTensor(shape, rows, self.ranks.index, own, self.ranks.ranks)
