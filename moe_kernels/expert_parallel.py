"""Experts spread over the processes of a group: rows travel to their experts and back by variable-split all-to-all.

`ExpertParallelExperts` takes the place of any experts in a layer. A rank may hold no tokens at all, but every rank must
call the layer, and backward, equally often.

Shapes: E experts, e experts of this rank, N rows of this rank's tokens, R rows that this rank computes, D model width.
"""

import copy
from collections.abc import Iterable, Mapping

import torch
import torch.distributed as dist
from torch import nn

from moe_kernels.errors import MoeError, check_choice
from moe_kernels.exchange import exchange, exchange_counts
from moe_kernels.experts import ExpertList, SwigluExperts, check_rows

LOSSES = ("mean", "sum")


def owned_experts(num_experts: int, group_size: int, rank: int, *, allows_empty: bool = False) -> range:
    """Experts that a rank holds: consecutive, and as equally many as possible.

    Args:
        num_experts: E.
        group_size: Ranks of the group.
        rank: The rank.
        allows_empty: Whether the last ranks may hold none, where there are fewer experts than ranks.

    Returns:
        Ids of the experts.

    Raises:
        MoeError: If there are fewer experts than ranks, and that is not allowed.
    """
    if num_experts < group_size and not allows_empty:
        remedy = "use a smaller group or more experts"
        raise MoeError("experts over ranks", got=num_experts, allowed=f"at least {group_size}", remedy=remedy)
    share, rest = divmod(num_experts, group_size)
    start = rank * share + min(rank, rest)
    return range(start, start + share + (rank < rest))


def take_experts(experts: nn.Module, owned: range) -> nn.Module:
    """Experts of a range, as a module of their own; the tensors are copied for stacks and shared for lists.

    Args:
        experts: A `SwigluExperts` or an `ExpertList`.
        owned: Consecutive ids, or none.

    Returns:
        The part; an `ExpertList` without experts where there are no ids.

    Raises:
        MoeError: If the experts are of another kind.
    """
    if not isinstance(experts, SwigluExperts | ExpertList):
        allowed = "SwigluExperts or ExpertList"
        raise MoeError("experts", got=type(experts).__name__, allowed=allowed, remedy="put modules into an ExpertList")
    if isinstance(experts, ExpertList) or not owned:
        return ExpertList([experts.experts[index] for index in owned] if isinstance(experts, ExpertList) else [])
    part = SwigluExperts(len(owned), experts.w1_EDF.shape[1], experts.w1_EDF.shape[2], backend=experts.backend)
    part = part.to(device=experts.w1_EDF.device, dtype=experts.w1_EDF.dtype)
    with torch.no_grad():
        for name, parameter in part.named_parameters():
            parameter.copy_(experts.get_parameter(name)[owned.start : owned.stop])
            parameter.requires_grad_(experts.get_parameter(name).requires_grad)
    return part


class ExpertParallelExperts(nn.Module):
    """This rank's experts, applied to the rows of all ranks.

    With ``loss="mean"`` each rank's loss is the mean over its own tokens, and gradients of all other parameters are
    averaged over the ranks, as data parallelism does. The gradients of the experts are divided by the number of ranks
    here, which makes them the gradients of the same mean loss: leave them out of the averaging. With ``loss="sum"``
    losses are sums over tokens, gradients of all other parameters are summed over the ranks, and those of the experts
    are left as they are: sums over the tokens of all ranks already.

    Args:
        experts: All experts, the same on every rank; only this rank's are kept.
        group: The group.
        loss: ``mean`` or ``sum``.
        allows_empty: Whether ranks may be left without experts, see `owned_experts`.

    Raises:
        MoeError: If there are fewer experts than ranks and that is not allowed, or ``loss`` is unknown.

    Attributes:
        share: Ids of this rank's experts.
        shares: Those of every rank.
        is_stack: Whether tensors of all experts are stacks by expert, rather than one module per expert.
    """

    def __init__(
        self,
        experts: SwigluExperts | ExpertList,
        group: dist.ProcessGroup,
        *,
        loss: str = "mean",
        allows_empty: bool = False,
    ) -> None:
        super().__init__()
        check_choice("loss", loss, LOSSES)
        self.num_experts, self.group = experts.num_experts, group
        self.rank, self.group_size = dist.get_rank(group), dist.get_world_size(group)
        ranks = range(self.group_size)
        self.shares = [owned_experts(self.num_experts, len(ranks), rank, allows_empty=allows_empty) for rank in ranks]
        self.share = self.shares[self.rank]
        self.local = take_experts(experts, self.share)
        self.is_stack = isinstance(experts, SwigluExperts)
        if loss == "mean":
            for parameter in self.local.parameters():
                parameter.register_hook(self._scaled)

    def _scaled(self, gradient: torch.Tensor) -> torch.Tensor:
        return gradient / self.group_size

    def forward(self, rows_ND: torch.Tensor, counts_E: torch.Tensor) -> torch.Tensor:
        """Apply the experts to rows ``(N, D)`` sorted by expert. Collective: all ranks of the group must call."""
        check_rows(rows_ND, counts_E, self.num_experts)
        parts = [counts_E[share.start : share.stop] for share in self.shares]
        counts_Pe = torch.stack(exchange_counts(parts, rows_ND.shape[1], self.group))
        # both at once: the host waits for the device a single time
        send, receive = torch.stack([torch.stack([part.sum() for part in parts]), counts_Pe.sum(1)]).tolist()
        rows_RD = exchange(rows_ND, send, receive, self.group)
        expert_R = torch.arange(counts_Pe.shape[1], device=rows_RD.device).repeat(self.group_size)
        expert_R = expert_R.repeat_interleave(counts_Pe.reshape(-1), output_size=sum(receive))
        order_R = torch.argsort(expert_R, stable=True)
        out_RD = self.local(rows_RD.index_select(0, order_R), counts_Pe.sum(0))
        back_RD = out_RD.index_select(0, torch.argsort(order_R))
        return exchange(back_RD, receive, send, self.group)

    def full_state(self) -> dict[str, torch.Tensor]:
        """Tensors of all experts by the names of the undivided module. Collective.

        Returns:
            A state for `SwigluExperts` or `ExpertList`, equal on every rank, for any number of ranks to load.
        """
        return self.gather_full(self.local.state_dict())

    def gather_full(self, local: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Join tensors that belong to the experts, such as gradients or the state of an optimizer. Collective.

        Args:
            local: This rank's tensors, by the names of the parameters of ``self.local``.

        Returns:
            The tensors of all ranks by the names of the undivided module, equal on every rank.
        """
        mine = {self.full_name(name): tensor.detach() for name, tensor in local.items()}
        device = next((tensor.device for tensor in mine.values()), _device_of(self.group))
        state: dict[str, list[torch.Tensor]] = {}
        for rank in range(self.group_size):
            source = dist.get_global_rank(self.group, rank)
            shapes: list[object] = [{name: (tensor.shape, tensor.dtype) for name, tensor in mine.items()}]
            dist.broadcast_object_list(shapes, src=source, group=self.group)
            assert isinstance(shapes[0], dict)
            for name, (shape, dtype) in shapes[0].items():
                tensor = mine[name].clone() if rank == self.rank else torch.empty(shape, dtype=dtype, device=device)
                dist.broadcast(tensor, src=source, group=self.group)
                state.setdefault(name, []).append(tensor)
        return {name: torch.cat(parts) if len(parts) > 1 else parts[0] for name, parts in state.items()}

    def full_name(self, name: str) -> str:
        """Name of a parameter of ``self.local`` in the undivided module."""
        if self.is_stack:
            return name
        head, index, rest = name.split(".", 2)
        return f"{head}.{int(index) + self.share.start}.{rest}"

    def undivided(self, state: Mapping[str, torch.Tensor]) -> SwigluExperts | ExpertList:
        """All experts in one module again, on a rank that holds at least one.

        Args:
            state: What `full_state` returns.

        Returns:
            A module with tensors of its own, on the device and in the dtype of the state.
        """
        local, first = self.local, next(iter(state.values()))
        if isinstance(local, ExpertList):
            experts = ExpertList(copy.deepcopy(local.experts[0]) for _ in range(self.num_experts))
        else:
            assert isinstance(local, SwigluExperts)
            widths = local.w1_EDF.shape[1:]
            experts = SwigluExperts(self.num_experts, *widths, backend=local.backend)
        experts = experts.to(device=first.device, dtype=first.dtype)
        experts.load_state_dict(dict(state))
        return experts.train(self.training)


def _device_of(group: dist.ProcessGroup) -> torch.device:
    is_nccl = dist.get_backend(group) == "nccl"
    return torch.device("cuda", torch.cuda.current_device()) if is_nccl else torch.device("cpu")


def spread_experts(
    model: nn.Module, group: dist.ProcessGroup, *, loss: str = "mean", allows_empty: bool = False
) -> dict[str, ExpertParallelExperts]:
    """Spread the experts of every layer of a model over the ranks of a group, in place.

    Args:
        model: Equal on every rank; what is named ``experts`` and is a `SwigluExperts` or an `ExpertList` is replaced.
        group: The group.
        loss: See `ExpertParallelExperts`.
        allows_empty: See `ExpertParallelExperts`.

    Returns:
        Path in the model -> what stands there now.

    Raises:
        MoeError: See `ExpertParallelExperts`.
    """
    spread = {}
    for path, layer in list(model.named_modules()):
        experts = dict(layer.named_children()).get("experts")  # not a property that looks into another module
        if isinstance(experts, SwigluExperts | ExpertList):
            layer.experts = ExpertParallelExperts(experts, group, loss=loss, allows_empty=allows_empty)
            spread[f"{path}.experts".removeprefix(".")] = layer.experts
    return spread


def average_gradients(parameters: Iterable[nn.Parameter], group: dist.ProcessGroup) -> None:
    """Average gradients over the ranks, in place. Collective; not for the experts of `ExpertParallelExperts`.

    Args:
        parameters: Parameters that all ranks hold, in the same order; a missing gradient counts as zero.
        group: The group.
    """
    for parameter in parameters:
        if not parameter.requires_grad:
            continue
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        dist.all_reduce(parameter.grad, group=group)
        parameter.grad /= dist.get_world_size(group)


def clip_gradients(
    shared: Iterable[nn.Parameter], local: Iterable[nn.Parameter], max_norm: float, group: dist.ProcessGroup
) -> float:
    """Clip by the norm of the whole model: what all ranks hold counts once, and every expert once. Collective.

    Args:
        shared: Parameters with equal gradients on all ranks.
        local: This rank's expert parameters.
        max_norm: Largest norm to leave.
        group: The group.

    Returns:
        The norm before clipping, equal on all ranks.
    """
    shared_grads = [parameter.grad for parameter in shared if parameter.grad is not None]
    local_grads = [parameter.grad for parameter in local if parameter.grad is not None]
    square = torch.zeros((), dtype=torch.float64)
    for gradient in local_grads:
        square += gradient.double().square().sum().cpu()
    dist.all_reduce(square, group=group)
    for gradient in shared_grads:
        square += gradient.double().square().sum().cpu()
    norm = float(square.sqrt())
    if norm > max_norm:
        for gradient in shared_grads + local_grads:
            gradient *= max_norm / norm
    return norm
