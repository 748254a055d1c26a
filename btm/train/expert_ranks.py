"""Which processes share out the experts of a model, and which hold the same ones."""

from dataclasses import dataclass

import torch
import torch.distributed as dist

from btm.errors import ConfigError
from btm.train.ranks import TIMEOUT, Ranks


@dataclass(frozen=True, slots=True)
class ExpertRanks:
    """P processes as P / X groups of X neighbours: a group holds every expert once, and its X shares are disjoint.

    Neighbours, because tokens travel inside a group with every layer, and launchers number the processes of one machine
    in a row.
    """

    ranks: Ranks
    size: int
    """Processes that share out the experts, X."""
    group: dist.ProcessGroup
    """Those of this process's group, in the order of their shares."""
    replicas: dist.ProcessGroup | None
    """Those that hold the same experts as this process; None where it is alone."""

    @staticmethod
    def of(ranks: Ranks, size: int) -> "ExpertRanks":
        """Make the groups; every process calls it.

        Raises:
            ConfigError: If ``size`` does not divide the number of processes.
        """
        check_division(size, ranks.size)
        group = _group_of(ranks, [range(first, first + size) for first in range(0, ranks.size, size)])
        replicas = _group_of(ranks, [range(index, ranks.size, size) for index in range(size)])
        assert group is not None
        return ExpertRanks(ranks, size, group, replicas)

    @property
    def index(self) -> int:
        """Number of this process's share."""
        return self.ranks.rank % self.size

    @property
    def is_first(self) -> bool:
        """Whether this process is in the first group, which speaks for all."""
        return self.ranks.rank < self.size

    def sum_over_replicas_(self, tensor: torch.Tensor) -> None:
        """Replace ``tensor`` by its sum over the processes that hold the same experts.

        Raises:
            PeerLostError: If a process is gone.
        """
        if self.replicas is not None:
            self.ranks.sum_(tensor, self.replicas)


def _group_of(ranks: Ranks, division: list[range]) -> dist.ProcessGroup | None:
    """The group of this process; every process takes part in making every group. None for a process alone."""
    mine = None
    for members in division:
        made = dist.new_group(list(members), timeout=TIMEOUT) if len(members) > 1 else None
        if ranks.rank in members and isinstance(made, dist.ProcessGroup):
            mine = made
    return mine


def check_division(expert_parallel: int, num_processes: int) -> None:
    """Refuse a number of processes that does not divide.

    Raises:
        ConfigError: If ``expert_parallel`` does not divide ``num_processes``.
    """
    if num_processes % expert_parallel:
        raise ConfigError(
            [
                f"engine.expert_parallel ({expert_parallel}) must divide the number of processes, which is "
                f"{num_processes}; set engine.num_processes to a multiple of it"
            ]
        )
