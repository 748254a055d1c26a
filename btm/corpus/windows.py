"""Held-out documents as windows for scoring: every token of every document is predicted exactly once.

Each document is read on its own, as the end-of-text token followed by its tokens, and cut into windows that do not
overlap; the same windows serve every model that is compared.
"""

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from btm.corpus.sampler import IGNORED


class Documents(Protocol):
    """Tokens of documents, as in :class:`btm.corpus.shards.TokenShard` or in memory."""

    lengths: np.ndarray
    """Tokens of each document, int64 ``(documents,)``."""
    tokens: np.ndarray
    """Ids of all documents one after the other ``(tokens,)``."""

    @property
    def bytes(self) -> np.ndarray:
        """UTF-8 bytes of each document's text, int64 ``(documents,)``."""
        ...


@dataclass(frozen=True, slots=True)
class Windows:
    """Windows of some documents, in the order of documents.

    Attributes:
        inputs: int64 ``(windows, sequence_length)``; padded with the end-of-text token.
        targets: int64, same shape; -100 where padded. Row by row, the others are ``token_ids``.
        document: Document of each window, int64 ``(windows,)``, from 0.
        lengths: Targets of each window, int64 ``(windows,)``.
        token_ids: All scored tokens, int64 ``(tokens,)``.
        document_starts: Start of each document in ``token_ids`` and the end of the last, int64 ``(documents + 1,)``.
        document_bytes: UTF-8 bytes of each document, int64 ``(documents,)``.
    """

    inputs: np.ndarray
    targets: np.ndarray
    document: np.ndarray
    lengths: np.ndarray
    token_ids: np.ndarray
    document_starts: np.ndarray
    document_bytes: np.ndarray


def document_windows(
    shard: Documents,
    *,
    sequence_length: int,
    eos_id: int,
    max_tokens: int | None = None,
    max_documents: int | None = None,
) -> Windows:
    """Cut the first documents of ``shard`` into windows.

    Args:
        shard: Documents, each ending in the end-of-text token.
        sequence_length: Inputs per window.
        eos_id: End-of-text token, read before every document.
        max_tokens: Stop after the document that reaches this many tokens; None takes all.
        max_documents: Documents at most; None takes all.
    """
    count = _documents_to_take(shard.lengths, max_tokens, max_documents)
    lengths = shard.lengths[:count]
    starts = np.concatenate([[0], np.cumsum(lengths)])
    token_ids = np.asarray(shard.tokens[: starts[-1]], dtype=np.int64)
    previous = np.empty_like(token_ids)
    previous[1:] = token_ids[:-1]
    previous[starts[:-1][lengths > 0]] = eos_id

    windows_of = -(-lengths // sequence_length)
    document = np.repeat(np.arange(count), windows_of)
    number = np.arange(len(document)) - np.repeat(np.cumsum(windows_of) - windows_of, windows_of)
    window_lengths = np.minimum(sequence_length, lengths[document] - number * sequence_length)
    is_real = np.arange(sequence_length) < window_lengths[:, None]
    inputs = np.full(is_real.shape, eos_id, dtype=np.int64)
    targets = np.full(is_real.shape, IGNORED, dtype=np.int64)
    inputs[is_real] = previous
    targets[is_real] = token_ids
    return Windows(inputs, targets, document, window_lengths, token_ids, starts, shard.bytes[:count])


def _documents_to_take(lengths: np.ndarray, max_tokens: int | None, max_documents: int | None) -> int:
    count = len(lengths)
    if max_documents is not None:
        count = min(count, max_documents)
    if max_tokens is not None:
        count = min(count, int(np.searchsorted(np.cumsum(lengths), max_tokens)) + 1)
    return count
