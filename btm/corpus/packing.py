"""How the documents of one source fill training sequences: contiguous blocks, or whole documents side by side.

Both readers answer "sequence number n of this source" directly, for any n, from the order of documents in n's epoch.
"""

from dataclasses import dataclass

import numpy as np

from btm.corpus.randomness import hash_positions, permutation
from btm.corpus.shards import TokenShard

_CACHED_EPOCHS = 2
_SMALLEST_PIECE = 2
"""Positions of a piece of one token: its context and itself."""


@dataclass(frozen=True, slots=True)
class Rows:
    """Sequences of one source: tokens ``(rows, length + 1)`` int64, segments of the same shape or None."""

    tokens: np.ndarray
    segments: np.ndarray | None
    num_targets: int


class BlockReader:
    """The documents of an epoch one after the other, cut into blocks of ``length`` targets.

    Row n predicts the tokens ``n * length .. (n + 1) * length - 1`` of the endless stream of epochs, each from the
    token before it; the first token of the stream is predicted from the end-of-text token.
    """

    def __init__(self, shard: TokenShard, documents: np.ndarray, *, key: int, length: int, eos_id: int) -> None:
        """Prepare to read.

        Args:
            shard: Where the tokens are.
            documents: Indices of the documents to take.
            key: Root of the order of documents.
            length: Targets per row.
            eos_id: End-of-text token.
        """
        self._tokens = shard.tokens
        self._starts = shard.starts[documents]
        self._lengths = shard.lengths[documents]
        self._key = key
        self._length = length
        self._eos_id = eos_id
        self._epoch_tokens = int(self._lengths.sum())
        self._epochs: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def read(self, numbers: np.ndarray) -> Rows:
        """The rows ``numbers`` (from 0)."""
        positions = (numbers[:, None] * self._length + np.arange(-1, self._length)).ravel()
        epochs, places = np.divmod(positions, self._epoch_tokens)
        tokens = np.empty(len(positions), dtype=np.int64)
        for epoch in np.unique(epochs):
            chosen = np.flatnonzero(epochs == epoch)
            if epoch < 0:
                tokens[chosen] = self._eos_id
            else:
                tokens[chosen] = self._at(int(epoch), places[chosen])
        return Rows(tokens.reshape(len(numbers), -1), None, len(numbers) * self._length)

    def _at(self, epoch: int, places: np.ndarray) -> np.ndarray:
        order, ends = self._order(epoch)
        slot = np.searchsorted(ends, places, side="right")
        document = order[slot]
        offset = places - (ends[slot] - self._lengths[document])
        return self._tokens[self._starts[document] + offset]

    def _order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        if epoch not in self._epochs:
            order = permutation(int(hash_positions(self._key, np.array(epoch))), len(self._lengths))
            while len(self._epochs) >= _CACHED_EPOCHS:
                del self._epochs[next(iter(self._epochs))]
            self._epochs[epoch] = order, np.cumsum(self._lengths[order])
        return self._epochs[epoch]


class DocumentReader:
    """Whole documents side by side in rows; one that is longer than a row is cut, and only such a one.

    Every piece is preceded by its context token (end-of-text before a document), so that each token of each document
    is a target once per epoch. Which pieces share a row is drawn once; the order of rows is drawn for each epoch.
    """

    def __init__(self, shard: TokenShard, documents: np.ndarray, *, key: int, length: int, eos_id: int) -> None:
        """Pack the documents; same arguments as :class:`BlockReader`."""
        self._tokens = shard.tokens
        self._eos_id = eos_id
        self._key = key
        self._width = length + 1
        starts, sizes, self._is_first = cut_documents(shard.starts[documents], shard.lengths[documents], length)
        shuffled = permutation(int(hash_positions(key, np.array(-1))), len(sizes))
        packed, self._row_ends = pack_rows(sizes, shuffled, self._width)
        self._starts, self._sizes, self._is_first = starts[packed], sizes[packed], self._is_first[packed]
        self._epochs: dict[int, np.ndarray] = {}

    def read(self, numbers: np.ndarray) -> Rows:
        """The rows ``numbers`` (from 0)."""
        num_rows = len(self._row_ends)
        epochs, places = np.divmod(numbers, num_rows)
        rows = np.array([self._order(int(e))[p] for e, p in zip(epochs, places, strict=True)], dtype=np.int64)
        tokens = np.full((len(rows), self._width), self._eos_id, dtype=np.int64)
        segments = np.zeros((len(rows), self._width), dtype=np.int32)
        num_targets = sum(self._fill(int(row), tokens[place], segments[place]) for place, row in enumerate(rows))
        return Rows(tokens, segments, num_targets)

    def _fill(self, row: int, tokens: np.ndarray, segments: np.ndarray) -> int:
        first = int(self._row_ends[row - 1]) if row else 0
        at = 0
        for number, piece in enumerate(range(first, int(self._row_ends[row])), start=1):
            start, size = int(self._starts[piece]), int(self._sizes[piece])
            if not self._is_first[piece]:
                tokens[at] = self._tokens[start - 1]
            tokens[at + 1 : at + 1 + size] = self._tokens[start : start + size]
            segments[at : at + 1 + size] = number
            at += 1 + size
        return at - (int(self._row_ends[row]) - first)

    def _order(self, epoch: int) -> np.ndarray:
        if epoch not in self._epochs:
            while len(self._epochs) >= _CACHED_EPOCHS:
                del self._epochs[next(iter(self._epochs))]
            key = int(hash_positions(self._key, np.array(epoch)))
            self._epochs[epoch] = permutation(key, len(self._row_ends))
        return self._epochs[epoch]


def cut_documents(starts: np.ndarray, lengths: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cut documents into pieces of at most ``length`` tokens.

    Returns:
        First token, size and "is the beginning of its document" of each piece.
    """
    counts = -(-lengths // length)
    document = np.repeat(np.arange(len(lengths)), counts)
    number = np.arange(len(document)) - np.repeat(np.cumsum(counts) - counts, counts)
    return starts[document] + number * length, np.minimum(length, lengths[document] - number * length), number == 0


def pack_rows(sizes: np.ndarray, order: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Put pieces into rows of ``width`` positions, each piece taking one position more than its size.

    Best fit by falling size: the fullest row that still holds the piece.

    Args:
        sizes: Tokens per piece, less than ``width``.
        order: Order in which pieces of equal size are taken.
        width: Positions per row.

    Returns:
        The pieces in the order of rows, and for each row the end of its pieces in that list.
    """
    taken = order[np.argsort(-sizes[order], kind="stable")]
    open_rows: list[list[int]] = [[] for _ in range(width + 1)]
    row_of = np.empty(len(sizes), dtype=np.int64)
    room_bits = 0
    num_rows = 0
    for piece, size in zip(taken.tolist(), (sizes[taken] + 1).tolist(), strict=True):
        fitting = room_bits >> size
        if fitting:
            room = size + (fitting & -fitting).bit_length() - 1
            row = open_rows[room].pop()
            if not open_rows[room]:
                room_bits ^= 1 << room
        else:
            room, row, num_rows = width, num_rows, num_rows + 1
        row_of[piece] = row
        left = room - size
        if left >= _SMALLEST_PIECE:
            open_rows[left].append(row)
            room_bits |= 1 << left
    packed = taken[np.argsort(row_of[taken], kind="stable")]
    return packed, np.cumsum(np.bincount(row_of, minlength=num_rows))
