"""Where the weights of one process lie in flat buffers: neighbours are those that are treated alike."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from btm.train.flat import SHARED, Owners, Slot, Span
from btm.train.megatron_mapping import Cut, Entry

_ALIGNMENT = 64


@dataclass(frozen=True, slots=True)
class FlatLayout:
    """A division of flat buffers.

    In order: matrices (which have weight decay) that are shared out, matrices that every tensor-parallel process has,
    vectors that every one has, vectors that are shared out; in each of them first what every token uses, then what
    belongs to experts.
    """

    slots: Mapping[str, Slot]
    """Place of each parameter, by name."""
    spans: tuple[Span, ...]
    """By weight decay and owner, without gaps."""
    copied: slice
    """The stretch of what every tensor-parallel process has."""
    size: int
    """Of the buffers, a multiple of the number of data-parallel processes."""

    @staticmethod
    def of(
        shapes: Mapping[str, torch.Size], entries: Sequence[Entry], owners: Owners, *, num_stretches: int
    ) -> "FlatLayout":
        """Lay out ``entries``.

        Args:
            shapes: Of this process's parameters, by name.
            entries: What they are.
            owners: By name, of those that experts own.
            num_stretches: Equal parts that the buffers can be cut into.
        """
        slots: dict[str, Slot] = {}
        heads: list[tuple[int, bool, int]] = []
        copied: list[Slot] = []
        begin = 0
        for entry in sorted(entries, key=lambda entry: _place(entry, shapes, owners)):
            shape = shapes[entry.name]
            rows = owners.get(entry.name, (SHARED,))
            for number, owner in enumerate(rows):
                if not heads or heads[-1][1:] != (len(shape) >= 2, owner):
                    heads.append((begin + number * shape.numel() // len(rows), len(shape) >= 2, owner))
            slots[entry.name] = Slot(entry.name, shape, begin, begin + shape.numel())
            if entry.cut is Cut.copied:
                copied.append(slots[entry.name])
            begin = _round_up(begin + shape.numel(), _ALIGNMENT)
        size = _round_up(begin, num_stretches * _ALIGNMENT)
        ends = [*(head[0] for head in heads[1:]), size]
        spans = tuple(Span(head[0], end, *head[1:], is_frozen=False) for head, end in zip(heads, ends, strict=True))
        border = slice(copied[0].begin, copied[-1].end) if copied else slice(size, size)
        return FlatLayout(slots, spans, border, size)

    def spans_of(self, own: slice) -> tuple[Span, ...]:
        """The parts of the spans that lie in a stretch, by their places in it."""
        parts = []
        for span in self.spans:
            begin, end = max(span.begin, own.start), min(span.end, own.stop)
            if begin < end:
                parts.append(Span(begin - own.start, end - own.start, span.is_decayed, span.owner, span.is_frozen))
        return tuple(parts)


def _place(entry: Entry, shapes: Mapping[str, torch.Size], owners: Owners) -> tuple[bool, bool, int]:
    is_vector = len(shapes[entry.name]) < 2
    is_copied = entry.cut is Cut.copied
    return is_vector, is_copied is not is_vector, owners.get(entry.name, (SHARED,))[0]


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
