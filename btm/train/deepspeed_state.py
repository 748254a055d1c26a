"""Masters and moments of a model under DeepSpeed, as whole tensors by their names in the undivided model."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from btm.train.deepspeed_shards import Shards
from btm.train.divided_tensor import DividedTensor
from btm.train.expert_division import ExpertDivision
from btm.train.ranks import Ranks


@dataclass(frozen=True, slots=True)
class WholeState:
    """Gathers what DeepSpeed and expert parallelism cut up, and cuts it up again."""

    shards: Shards
    parameters: Mapping[str, nn.Parameter]
    """Of this process, by their names here."""
    division: ExpertDivision | None
    """Of the experts over processes; None where each has all."""
    ranks: Ranks

    @property
    def local(self) -> set[str]:
        """Names of the parameters that only some processes hold."""
        return set() if self.division is None else set(self.division.local_names.values())

    def gathered(self, kind: str | None) -> Iterator[tuple[str, torch.Tensor]]:
        """On the main rank whole masters (None) or moments by name, copies on the CPU; every rank runs it."""
        own: dict[str, torch.Tensor] = {}
        local = self.local
        for name, parameter in self.parameters.items():
            value = self.shards.whole(parameter, kind).detach()
            if name in local:
                own[name] = value
            elif self.ranks.is_main:
                yield name, value.to("cpu", copy=True).contiguous()
        for name, value in {} if self.division is None else self.division.undivided(own).items():
            assert isinstance(value, DividedTensor)
            if self.ranks.is_main:
                yield name, value.whole()
            else:
                value.contribute()

    def fill(self, name: str, kind: str | None, value: torch.Tensor) -> None:
        """Take this process's part of a whole master (None) or moment."""
        own_name, own = name, value
        if self.division is not None and name in self.division.shapes:
            own_name, own = self.division.local_names.get(name, ""), self.division.own_rows(name, value)
        if own is not None:
            self.shards.fill(self.parameters[own_name], kind, own)

    def restore(self, model: PreTrainedModel, dtype: torch.dtype) -> None:
        """Put rounded masters into ``model``, all of them on the main process and its CPU; training ends with this."""
        local = self.local
        for name, parameter in self.parameters.items():
            value = self.shards.whole(parameter, None).detach()
            if name in local:
                parameter.data = value.to(dtype, copy=True)
            elif self.ranks.is_main:
                parameter.data = value.to("cpu", dtype, copy=True)
        if self.division is not None:
            self.division.restore(model, dtype)
