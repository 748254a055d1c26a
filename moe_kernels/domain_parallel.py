"""Data parallelism by domain: a rank sees its domains only; an expert's gradients come from the ranks that had it.

Shapes: J domains, P ranks.
"""

import torch
import torch.distributed as dist

from moe_kernels.errors import check_choice, check_range
from moe_kernels.experts import ExpertList

MEANS = ("domain", "global")


def domains_of_ranks(num_domains: int, world_size: int) -> tuple[tuple[int, ...], ...]:
    """Which domains each rank trains, as evenly as possible.

    With more ranks than domains, consecutive ranks share one; with fewer, a rank has several consecutive ones.

    Args:
        num_domains: J.
        world_size: P.

    Returns:
        For every rank the ids of its domains; every domain has a rank and every rank a domain.

    Raises:
        MoeError: If a number is below 1.
    """
    check_range("num_domains", num_domains, low=1)
    check_range("world_size", world_size, low=1)
    if world_size >= num_domains:
        return tuple((rank * num_domains // world_size,) for rank in range(world_size))
    return tuple(
        tuple(domain for domain in range(num_domains) if domain * world_size // num_domains == rank)
        for rank in range(world_size)
    )


def average_domain_gradients(experts: ExpertList, group: dist.ProcessGroup, *, mean: str = "domain") -> None:
    """Average the gradients of experts over the ranks that had tokens for them, in place. Collective.

    An expert without tokens on any rank keeps no gradient at all, so no optimizer moves it.

    Args:
        experts: The experts of a DEMix layer, the same on every rank.
        group: All ranks, or only those that share a domain where each rank keeps its own experts.
        mean: ``domain`` divides by the ranks that had the expert: the gradient of the mean loss of its domain.
            ``global`` divides by all ranks of the group, as the published code does: the gradient of the mean loss of
            the whole batch, so ``J`` times smaller where every domain has equally many ranks.

    Raises:
        MoeError: If ``mean`` is unknown.
    """
    check_choice("mean", mean, MEANS)
    modules = list(experts.experts)
    has_gradient = [any(parameter.grad is not None for parameter in module.parameters()) for module in modules]
    holders = torch.tensor(has_gradient, dtype=torch.int64, device=next(experts.parameters()).device)
    dist.all_reduce(holders, group=group)
    for module, count in zip(modules, holders.tolist(), strict=True):
        if not count:
            continue
        divisor = count if mean == "domain" else dist.get_world_size(group)
        for parameter in module.parameters():
            if not parameter.requires_grad:
                continue
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            dist.all_reduce(gradient, group=group)
            parameter.grad = gradient / divisor
