"""The forward passes of one process over an update and over dev documents, for every engine alike."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from btm.config_train import TrainConfig
from btm.corpus.sampler import Batch
from btm.corpus.windows import Windows
from btm.model.loss import IGNORED
from btm.train.expert_passes import order_by_expert, passes_of, passes_of_rank
from btm.train.ranks import Ranks
from moe_kernels.layers import DemixLayer

_MAX_SEED = 2**63


@dataclass(frozen=True, slots=True)
class Pass:
    """Sequences that go through the model together."""

    part: Batch
    is_padding: bool
    """Whether it is there only because other processes run more passes."""
    is_last: bool
    """Of this process in this update."""


@dataclass(frozen=True, slots=True)
class Passes:
    """How updates and dev documents are cut up.

    Attributes:
        train: Recipe.
        ranks: The processes that share them.
        sizes: Sequences of each pass of an update, in the order of the batch; None divides what each process has by
            ``train.micro_batch_sequences``.
        num_groups: Groups of processes that each hold the experts that domains decide on; None leaves sequences in
            their order.
        are_equal: Whether every process must run equally many passes of an update.
        dev_are_equal: Whether it must do so outside of training.
    """

    train: TrainConfig
    ranks: Ranks
    sizes: Sequence[int] | None = None
    num_groups: int | None = None
    are_equal: bool = False
    dev_are_equal: bool = False

    @staticmethod
    def of(
        model: nn.Module,
        train: TrainConfig,
        ranks: Ranks,
        *,
        sizes: Sequence[int] | None,
        num_shares: int,
        are_equal: bool,
        dev_are_equal: bool,
    ) -> "Passes":
        """Passes over ``model``, whose experts ``num_shares`` processes share out; for the rest see the attributes."""
        is_moved = num_shares > 1 and any(isinstance(module, DemixLayer) for module in model.modules())
        groups = ranks.size // num_shares if is_moved else None
        return Passes(train, ranks, sizes, groups, are_equal, dev_are_equal)

    def of_batch(self, batch: Batch, random_seed: int) -> Iterator[Pass]:
        """Passes of this process, each with random numbers of its own, whoever runs it."""
        batch = self._ordered(batch)
        sizes = self.sizes or passes_of(len(batch.tokens), self.ranks.size, self.train.micro_batch_sequences)
        begins = np.cumsum([0, *sizes])
        own = passes_of_rank(len(sizes), self.ranks.rank, self.ranks.size)
        count = -(-len(sizes) // self.ranks.size) if self.are_equal else len(own)
        for index in range(count):
            is_last = index == count - 1
            if index >= len(own):
                yield Pass(batch.padding(), True, is_last)
                continue
            number = own[index]
            torch.manual_seed((random_seed * len(sizes) + number) % _MAX_SEED)
            yield Pass(batch.part(slice(begins[number], begins[number + 1])), False, is_last)

    def of_windows(self, windows: Windows) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Inputs and targets of this process; a pass of padding has no targets."""
        count = self.train.micro_batch_sequences or max(1, self.train.batch_tokens // self.train.sequence_length)
        for first in range(0, len(windows.inputs), self.ranks.size * count):
            begin = first + self.ranks.rank * count
            if begin < len(windows.inputs):
                yield windows.inputs[begin : begin + count], windows.targets[begin : begin + count]
            elif self.dev_are_equal:
                yield windows.inputs[:1], np.full_like(windows.targets[:1], IGNORED)

    def _ordered(self, batch: Batch) -> Batch:
        """The batch with sequences near the experts that their domain alone decides on."""
        if self.num_groups is None or batch.domain is None:
            return batch
        order = order_by_expert(batch.domain, self.ranks.size // self.num_groups, self.num_groups)
        segments = None if batch.segments is None else batch.segments[order]
        return Batch(batch.tokens[order], segments, batch.domain_tokens, batch.domain[order])
