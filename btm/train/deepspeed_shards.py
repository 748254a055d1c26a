"""Where DeepSpeed keeps master weights, moments and gradients, for each of the optimizers that it wraps around ours.

DeepSpeed cuts them differently in every ZeRO stage. Here each stage answers the same few questions, so that the engine
can write whole tensors under their own names, and fill them again, whatever the stage and the number of processes.
Nothing is imported from DeepSpeed; the attributes that are read are those of 0.19.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn

from btm.train.expert_steps import Stretches
from btm.train.flat import SHARED, Owners
from btm.train.gathered_tensors import MOMENTS


class Place(NamedTuple):
    """Where a part of a parameter lies on this process."""

    master: torch.Tensor
    begin: int
    """First element in the master, flat."""
    first: int
    """First element of the parameter, flat, that is there."""
    length: int


class Shards(Protocol):
    """This process's part of the training state."""

    masters: Sequence[torch.Tensor]
    """fp32 tensors that the inner optimizer steps on here."""

    def gradients(self) -> list[torch.Tensor]:
        """Gradients, averaged over processes, between the last backward of an update and its step.

        Those of all processes together are those of the model, each element once.
        """
        ...

    def place(self, parameter: nn.Parameter) -> Place | None:
        """Where this process has its part of ``parameter``; None where it has none."""
        ...

    def whole(self, parameter: nn.Parameter, kind: str | None) -> torch.Tensor:
        """Master weight (None) or moment of ``parameter`` in full, fp32; every process calls it."""
        ...

    def fill(self, parameter: nn.Parameter, kind: str | None, value: torch.Tensor) -> None:
        """Take this process's part of ``value``, the whole master weight or moment."""
        ...

    def refresh_weights(self) -> None:
        """Round the master weights to the type of forward and backward; every process calls it."""
        ...

    def drop_gradients(self) -> bool:
        """Forget the gradients of an update that is skipped; False where only a step does it."""
        ...


def shards_of(
    optimizer: Any, inner: torch.optim.Optimizer, *, stage: int, rank: int, counted: Collection[nn.Parameter]
) -> Shards:
    """The shards of a new DeepSpeed engine, with moments of zero in ``inner``.

    Args:
        optimizer: What DeepSpeed made of ``inner``.
        inner: The optimizer that was given to DeepSpeed.
        stage: Of ZeRO.
        rank: Of this process.
        counted: Parameters whose gradients this process speaks for, where others have the same ones.
    """
    shards: Shards
    if stage == 0:
        shards = _Replicated(optimizer, inner, counted)
    elif stage == 3:
        shards = _AllShared(optimizer, inner, rank)
    elif hasattr(optimizer, "fp32_groups_flat_partition"):
        shards = _StateSharedInBf16(optimizer)
    else:
        shards = _StateShared(optimizer)
    for master in shards.masters:
        inner.state[master] = {kind: torch.zeros_like(master, requires_grad=False) for kind in MOMENTS}
    if isinstance(shards, _StateShared):
        optimizer._lazy_init_hp_params_optimizer_state()
    return shards


def stretches_of(
    shards: Shards, parameters: Mapping[str, nn.Parameter], owners: Owners
) -> dict[torch.Tensor, Stretches]:
    """What lies in each master of this process, padding left out.

    Args:
        shards: Of this process.
        parameters: By name.
        owners: Experts of the parameters that belong to some.
    """
    parts: dict[torch.Tensor, list[tuple[int, int, int]]] = {master: [] for master in shards.masters}
    for name, parameter in parameters.items():
        place = shards.place(parameter)
        if place is None:
            continue
        rows = owners.get(name, (SHARED,))
        size = parameter.numel() // len(rows) if len(rows) > 1 else place.first + place.length
        for number, owner in enumerate(rows):
            first, last = max(place.first, number * size), min(place.first + place.length, (number + 1) * size)
            if first < last:
                begin = place.begin + first - place.first
                parts[place.master].append((begin, begin + last - first, owner))
    return {master: Stretches.of(found) for master, found in parts.items()}


class _Replicated:
    """ZeRO 0: the inner optimizer has the parameters themselves, or fp32 copies of them one by one."""

    def __init__(self, optimizer: Any, inner: torch.optim.Optimizer, counted: Collection[nn.Parameter]) -> None:
        self._inner = inner
        self._counted = counted
        weights = getattr(optimizer, "fp16_groups", None)
        masters = [group["params"] for group in inner.param_groups]
        pairs = zip(masters if weights is None else weights, masters, strict=True)
        self._master_of = {
            parameter: master for group, own in pairs for parameter, master in zip(group, own, strict=True)
        }
        self.masters: Sequence[torch.Tensor] = list(self._master_of.values())

    def gradients(self) -> list[torch.Tensor]:
        return [parameter.grad for parameter in self._counted if parameter.grad is not None]

    def place(self, parameter: nn.Parameter) -> Place | None:
        return Place(self._master_of[parameter], 0, 0, parameter.numel())

    def whole(self, parameter: nn.Parameter, kind: str | None) -> torch.Tensor:
        master = self._master_of[parameter]
        return master.detach() if kind is None else self._inner.state[master][kind]

    def fill(self, parameter: nn.Parameter, kind: str | None, value: torch.Tensor) -> None:
        self.whole(parameter, kind).copy_(value)

    def refresh_weights(self) -> None:
        for parameter, master in self._master_of.items():
            if parameter is not master:
                parameter.data.copy_(master.data)

    def drop_gradients(self) -> bool:
        for parameter in self._master_of:
            parameter.grad = None
        return True


class _StateShared:
    """ZeRO 1 and 2: each group of parameters is one flat tensor, cut into equal stretches."""

    def __init__(self, optimizer: Any) -> None:
        self._optimizer = optimizer
        self.masters: Sequence[torch.Tensor] = self._flat_masters()

    def gradients(self) -> list[torch.Tensor]:
        if self._optimizer.cpu_offload:
            return [master.grad for master in self.masters if master.grad is not None]
        return [gradient for group in self._optimizer.averaged_gradients.values() for gradient in group]

    def place(self, parameter: Any) -> Place | None:
        mapping = parameter._hp_mapping
        if mapping is None:
            return None
        here, there = mapping.hp_fragment_address, mapping.lp_fragment_address
        return Place(self.masters[mapping.param_group_index], here.start, there.start, there.numel)

    def whole(self, parameter: Any, kind: str | None) -> torch.Tensor:
        return parameter.get_full_hp_param(kind)

    def fill(self, parameter: Any, kind: str | None, value: torch.Tensor) -> None:
        parameter.set_full_hp_param(value, kind)

    def refresh_weights(self) -> None:
        self._optimizer.update_lp_params()

    def drop_gradients(self) -> bool:
        return False

    def _flat_masters(self) -> Sequence[torch.Tensor]:
        return self._optimizer.single_partition_of_fp32_groups


class _StateSharedInBf16(_StateShared):
    """ZeRO 1 in bf16, for which DeepSpeed has an optimizer of its own that adds up gradients in fp32."""

    def gradients(self) -> list[torch.Tensor]:
        return self._optimizer.fp32_groups_gradient_flat_partition

    def drop_gradients(self) -> bool:
        # Its step refuses gradients that are not finite, and would not forget them.
        self._optimizer.zero_grad()
        return True

    def _flat_masters(self) -> Sequence[torch.Tensor]:
        return self._optimizer.fp32_groups_flat_partition


class _AllShared:
    """ZeRO 3: each parameter is cut into equal stretches, the last one padded; groups of these are flat tensors."""

    def __init__(self, optimizer: Any, inner: torch.optim.Optimizer, rank: int) -> None:
        self._optimizer = optimizer
        self._inner = inner
        self._rank = rank
        self.masters: Sequence[torch.Tensor] = optimizer.fp32_partitioned_groups_flat

    def gradients(self) -> list[torch.Tensor]:
        if self._optimizer.offload_optimizer:
            return [master.grad for master in self.masters if master.grad is not None]
        return [gradient for group in self._optimizer.averaged_gradients.values() for gradient in group]

    def place(self, parameter: nn.Parameter) -> Place | None:
        group, begin, length = self._optimizer.grad_position[self._optimizer.get_param_id(parameter)]
        first = min(self._rank * length, parameter.ds_numel)  # pyright: ignore[reportAttributeAccessIssue]
        rest = parameter.ds_numel - first  # pyright: ignore[reportAttributeAccessIssue]
        return Place(self.masters[group], begin, first, min(length, rest))

    def whole(self, parameter: nn.Parameter, kind: str | None) -> torch.Tensor:
        return self._optimizer.get_full_hp_param(parameter, kind)

    def fill(self, parameter: nn.Parameter, kind: str | None, value: torch.Tensor) -> None:
        group, begin, length = self._optimizer.grad_position[self._optimizer.get_param_id(parameter)]
        master = self.masters[group]
        own = (master.detach() if kind is None else self._inner.state[master][kind])[begin : begin + length]
        part = value.flatten()[self._rank * length : (self._rank + 1) * length]
        own[: len(part)].copy_(part)
        own[len(part) :].zero_()

    def refresh_weights(self) -> None:
        for group in range(len(self.masters)):
            self._optimizer._reassign_or_swap_out_partitioned_parameters(group)
        small = self._optimizer.persistent_parameters
        if small:
            small[0].all_gather(small)

    def drop_gradients(self) -> bool:
        return False
