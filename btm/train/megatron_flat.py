"""One process's slice of all weights in flat buffers: one reduction, one norm, one optimizer call per update.

Weights and gradients of the tensor-parallel slice are whole on every data-parallel process; fp32 master weights and
moments are cut into equal stretches, one per data-parallel process (ZeRO 1, https://arxiv.org/abs/1910.02054).
"""

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import nn

from btm.config_train import TrainConfig
from btm.train.flat import Slot, sum_of_squares
from btm.train.gathered_tensors import MOMENTS
from btm.train.megatron_mapping import Cut, Entry
from btm.train.megatron_start import Mesh

_ALIGNMENT = 64


class FlatSlice:
    """Weights, gradients, masters, moments and the AdamW (https://arxiv.org/abs/1711.05101) that steps on them.

    Order in the buffers: matrices (which have weight decay), vectors that are shared out, vectors that every
    tensor-parallel process has. The last get their gradients from all of these processes and stay the same bits there.

    Attributes:
        slots: Place of each parameter, by name.
        weights: ``(size,)`` of the type of forward and backward; the model's parameters are views of it.
        gradients: fp32 ``(size,)``.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        entries: Sequence[Entry],
        mesh: Mesh,
        *,
        train: TrainConfig,
        dtype: torch.dtype,
        device: torch.device,
        has_parts: bool,
    ) -> None:
        """Take over ``parameters``, whose values are lost.

        Args:
            parameters: Of this process, by Megatron's names.
            entries: What they are.
            mesh: Where this process stands.
            train: Recipe.
            dtype: Of forward and backward.
            device: Where the buffers lie.
            has_parts: Whether gradients of copied vectors are sums over tensor-parallel processes (sequence parallel).
        """
        self._mesh = mesh
        ordered = sorted(entries, key=lambda entry: (parameters[entry.name].ndim < 2, entry.cut is Cut.copied))
        self.slots: dict[str, Slot] = {}
        begin = 0
        decay_end = copied_begin = None
        for entry in ordered:
            shape = parameters[entry.name].shape
            if len(shape) < 2 and decay_end is None:
                decay_end = begin
            if entry.cut is Cut.copied and copied_begin is None:
                copied_begin = begin
            self.slots[entry.name] = Slot(entry.name, shape, begin, begin + shape.numel())
            begin = _round_up(begin + shape.numel(), _ALIGNMENT)
        size = _round_up(begin, mesh.data_size * _ALIGNMENT)
        self._copied = slice(size if copied_begin is None else copied_begin, size)
        # A process counts each gradient once: the copied ones on the first of the tensor-parallel processes.
        self._is_dropped = {
            entry.name: entry.cut is Cut.copied and not (entry.is_by_head or has_parts) and mesh.tensor_rank > 0
            for entry in entries
        }
        stretch = size // mesh.data_size
        self._own = slice(mesh.data_rank * stretch, (mesh.data_rank + 1) * stretch)
        self.weights = torch.zeros(size, dtype=dtype, device=device)
        self.gradients = torch.zeros(size, dtype=torch.float32, device=device)
        self._is_exact = dtype == torch.float32
        self._masters = self.weights[self._own] if self._is_exact else torch.zeros(stretch, device=device)
        self._moments = {kind: torch.zeros(stretch, device=device) for kind in MOMENTS}
        self._own_gradients = self.gradients if mesh.data_size == 1 else torch.zeros(stretch, device=device)
        self._filled: set[str] = set()
        for name, slot in self.slots.items():
            parameters[name].data = slot.view(self.weights)
            parameters[name].register_post_accumulate_grad_hook(self._taker(name))
        self._optimizer = self._make_optimizer(train, size if decay_end is None else decay_end)

    def start_gradients(self) -> None:
        """Begin an update: the next gradient of each parameter replaces what is there."""
        self._filled.clear()

    def reduce_gradients(self) -> torch.Tensor:
        """End an update: sum gradients over all processes that have a part of them. Collective.

        Returns:
            fp64 scalar: this process's share of the squared norm; the shares of all processes add up to it.
        """
        for name, slot in self.slots.items():
            if name not in self._filled or self._is_dropped[name]:
                slot.view(self.gradients).zero_()
        if self._mesh.tensor_size > 1 and self.gradients[self._copied].numel():
            dist.all_reduce(self.gradients[self._copied], group=self._mesh.tensor_group)
        if self._mesh.data_size > 1:
            dist.reduce_scatter_tensor(self._own_gradients, self.gradients, group=self._mesh.data_group)
        copied = max(0, min(self._copied.start - self._own.start, len(self._own_gradients)))
        counted = self._own_gradients if self._mesh.tensor_rank == 0 else self._own_gradients[:copied]
        return sum_of_squares(counted)

    def step(self, learning_rate: float, gradient_divisor: float) -> None:
        """Step on this process's stretch and exchange the new weights. Collective.

        Args:
            learning_rate: Of this step.
            gradient_divisor: What the summed gradients are divided by.
        """
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
            for master in group["params"]:
                begin = master.storage_offset() - self._masters.storage_offset()
                master.grad = self._own_gradients[begin : begin + len(master)]
        # The fused kernel divides by this on the way.
        self._optimizer.grad_scale = torch.tensor(gradient_divisor, device=self.weights.device)  # pyright: ignore[reportAttributeAccessIssue]
        self._optimizer.step()
        self.refresh_weights()

    def refresh_weights(self) -> None:
        """Round the masters to the type of forward and backward, and gather those of the others. Collective."""
        if not self._is_exact:
            self.weights[self._own].copy_(self._masters)
        if self._mesh.data_size > 1:
            own = self.weights[self._own].clone()
            dist.all_gather_into_tensor(self.weights, own, group=self._mesh.data_group)

    def whole(self, kind: str | None) -> torch.Tensor:
        """Masters (None) or a moment of the whole tensor-parallel slice, fp32 ``(size,)``. Collective."""
        own = self._masters if kind is None else self._moments[kind]
        if self._mesh.data_size == 1:
            return own
        result = torch.empty(self.gradients.shape, device=own.device)
        dist.all_gather_into_tensor(result, own.clone(), group=self._mesh.data_group)
        return result

    def fill(self, name: str, kind: str | None, value: torch.Tensor) -> None:
        """Take this process's stretch of the slice ``value`` of a master (None) or moment."""
        slot = self.slots[name]
        if value.shape != slot.shape:
            raise ValueError(f"{name} has shape {list(slot.shape)}, got {list(value.shape)}")
        own = self._masters if kind is None else self._moments[kind]
        begin, end = max(slot.begin, self._own.start), min(slot.end, self._own.stop)
        if begin < end:
            part = value.flatten()[begin - slot.begin : end - slot.begin]
            own[begin - self._own.start : end - self._own.start].copy_(part)

    def set_step(self, num_steps: int) -> None:
        """Tell the optimizer how many steps the moments have behind them."""
        for state in self._optimizer.state.values():
            state["step"].fill_(num_steps)

    def _taker(self, name: str) -> Callable[[torch.Tensor], None]:
        view = self.slots[name].view(self.gradients)

        def take(parameter: torch.Tensor) -> None:
            if parameter.grad is None:
                return
            if name in self._filled:
                view.add_(parameter.grad)
            else:
                view.copy_(parameter.grad)
                self._filled.add(name)
            parameter.grad = None

        return take

    def _make_optimizer(self, train: TrainConfig, decay_end: int) -> torch.optim.AdamW:
        border = max(0, min(decay_end - self._own.start, len(self._masters)))
        groups = []
        for part, decay in ((slice(0, border), train.weight_decay), (slice(border, len(self._masters)), 0.0)):
            if part.start < part.stop:
                groups.append({"params": [nn.Parameter(self._masters[part])], "weight_decay": decay})
        optimizer = torch.optim.AdamW(groups, lr=train.lr, betas=(train.beta1, train.beta2), eps=train.eps, fused=True)
        for group in groups:
            (master,) = group["params"]
            begin = master.storage_offset() - self._masters.storage_offset()
            optimizer.state[master] = {
                "step": torch.zeros((), dtype=torch.float32, device=master.device),
                **{kind: moment[begin : begin + len(master)] for kind, moment in self._moments.items()},
            }
        return optimizer


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
