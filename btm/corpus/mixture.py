"""Which source each training sequence comes from: mixture weights met exactly, not on average.

The sequences of a cycle are given out so that after any number of sequences each source has its share of them to
within one sequence (the "chairman assignment" of Tijdeman 1980); the cycle repeats, so any position is found in
constant time.
"""

import heapq
import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

_LONGEST_CYCLE = 1 << 16


class MixtureSchedule:
    """Endless assignment of sequences to sources."""

    def __init__(self, weights: Sequence[float]) -> None:
        """Plan one cycle.

        Args:
            weights: Share of each source, positive, any sum; rounded to multiples of 1/65536 where they have no
                smaller common denominator.
        """
        counts = cycle_counts(weights)
        self._counts = np.array(counts, dtype=np.int64)
        self._source = _assign_cycle(counts)
        self._rank = np.empty(len(self._source), dtype=np.int64)
        for index, count in enumerate(counts):
            self._rank[self._source == index] = np.arange(count)

    def draw(self, first: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Sources of the sequences ``first .. first + count - 1``.

        Returns:
            Index of the source, and the number of earlier sequences from that source, int64 ``(count,)`` each.
        """
        cycle, place = np.divmod(np.arange(first, first + count, dtype=np.int64), len(self._source))
        source = self._source[place]
        return source, cycle * self._counts[source] + self._rank[place]


def cycle_counts(weights: Sequence[float]) -> list[int]:
    """Sequences of each source in one cycle: exact for weights with a small common denominator, else to 1/65536."""
    exact = [Fraction(weight).limit_denominator(_LONGEST_CYCLE) for weight in weights]
    total = sum(exact)
    if total > 0 and all(share > 0 for share in exact):
        shares = [share / total for share in exact]
        period = math.lcm(*(share.denominator for share in shares))
        if period <= _LONGEST_CYCLE:
            return [int(share * period) for share in shares]
    scale = _LONGEST_CYCLE / math.fsum(weights)
    ideal = [weight * scale for weight in weights]
    counts = [max(1, int(share)) for share in ideal]
    by_remainder = sorted(range(len(weights)), key=lambda index: counts[index] - ideal[index])
    for index in by_remainder[: max(0, _LONGEST_CYCLE - sum(counts))]:
        counts[index] += 1
    return counts


def _assign_cycle(counts: Sequence[int]) -> np.ndarray:
    period = sum(counts)
    released: list[tuple[int, int]] = []
    waiting = [(0, index, 0) for index in range(len(counts))]
    heapq.heapify(waiting)
    order = np.empty(period, dtype=np.int64)
    taken = [0] * len(counts)
    for place in range(period):
        # A source's next turn may come once its share of the places so far exceeds its turns, and must come
        # before its share exceeds them by one: the most urgent of those allowed goes first.
        while waiting and waiting[0][0] <= place:
            _, index, turns = heapq.heappop(waiting)
            heapq.heappush(released, (-(-(turns + 1) * period // counts[index]), index))
        _, index = heapq.heappop(released)
        order[place] = index
        taken[index] += 1
        heapq.heappush(waiting, (taken[index] * period // counts[index], index, taken[index]))
    return order
