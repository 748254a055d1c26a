"""Which split each document goes to, and which documents go nowhere because another document holds their text.

Three rules, in this order; a document that one of them drops does not count for the next:

1. Of documents with equal text one stays: the first of its domain, and of domains the earlier one.
2. A held-out document (dev or test) that nearly copies a training document is dropped, in the same domain and across
   domains; of two domains the later one gives way, so that a domain never changes because another one joins.
3. The split depends on the document's text alone, and where it holds pictures, on its first picture alone.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import IntEnum

import numpy as np

_BAND = "<u4"
_CHUNK_ROWS = 1 << 16
_MAX_CANDIDATES = 64
_PAIRS = 1 << 16


class Fate(IntEnum):
    """What becomes of a document; stored as uint8."""

    train = 0
    dev = 1
    test = 2
    exact_duplicate = 3
    near_duplicate = 4


@dataclass(frozen=True, slots=True)
class DocumentSet:
    """What is remembered of a domain's documents.

    Attributes:
        domain: Its name.
        hashes: 64-bit hash of each document's text, uint64 ``(documents,)``.
        signatures: See :func:`btm.corpus.shingles.signatures`; uint8 ``(documents, 128)``, or no rows when near
            duplicates are not looked for.
        fates: uint8 ``(documents,)``; empty until decided.
        split_keys: What the split depends on, uint64 ``(documents,)``; None takes the hashes.
    """

    domain: str
    hashes: np.ndarray
    signatures: np.ndarray
    fates: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.uint8))
    split_keys: np.ndarray | None = None


def split_of(hashes: np.ndarray, *, dev_fraction: float, test_fraction: float) -> np.ndarray:
    """Split of each document by its hash alone, uint8 ``(documents,)``: train, dev or test of :class:`Fate`."""
    place = hashes.astype(np.float64) / 2.0**64
    held_out = np.where(place < test_fraction, np.uint8(Fate.test), np.uint8(Fate.dev))
    return np.where(place < test_fraction + dev_fraction, held_out, np.uint8(Fate.train))


def repeated(hashes: np.ndarray) -> np.ndarray:
    """Whether the same hash stands earlier in the list, bool ``(documents,)``."""
    _, first = np.unique(hashes, return_index=True)
    result = np.ones(len(hashes), dtype=bool)
    result[first] = False
    return result


def near_copies(queries: np.ndarray, references: np.ndarray, rows: np.ndarray, threshold: float) -> np.ndarray:
    """Which queries have a reference whose estimated Jaccard similarity reaches ``threshold``.

    Locality-sensitive hashing (Indyk and Motwani 1998): only pairs that agree in one of 32 bands of 4 entries are
    compared, which finds a pair of similarity 0.8 with a chance above 0.9999 and one of 0.5 with 0.87. Of the
    references that share a band at most 64 in 65,536 are compared, so that repetitive text costs no quadratic time.

    Args:
        queries: Signatures, uint8 ``(queries, 128)``.
        references: Signatures, uint8 ``(references, 128)``; may be memory-mapped.
        rows: Rows of ``references`` to compare with.
        threshold: In (0, 1].

    Returns:
        bool ``(queries,)``.
    """
    found = np.zeros(len(queries), dtype=bool)
    # Of 8-bit entries of unrelated documents one in 256 agrees by chance.
    needed = np.ceil((threshold + (1 - threshold) / 256) * queries.shape[1] - 1e-9)
    bands = np.ascontiguousarray(queries).view(_BAND)
    for start in range(0, len(rows), _CHUNK_ROWS):
        chunk = np.ascontiguousarray(references[rows[start : start + _CHUNK_ROWS]])
        for band in range(bands.shape[1]):
            keys = chunk.view(_BAND)[:, band]
            order = np.argsort(keys, kind="stable")
            mine = np.flatnonzero(~found)
            for query, reference in _pairs(mine, bands[mine, band], order, keys[order]):
                agree = (queries[query] == chunk[reference]).sum(axis=1)
                found[query[agree >= needed]] = True
    return found


def _pairs(
    mine: np.ndarray, own: np.ndarray, order: np.ndarray, keys: np.ndarray
) -> Iterable[tuple[np.ndarray, np.ndarray]]:
    low = np.searchsorted(keys, own, side="left")
    counts = np.minimum(np.searchsorted(keys, own, side="right") - low, _MAX_CANDIDATES)
    for start in range(0, len(mine), _PAIRS // _MAX_CANDIDATES):
        part = slice(start, start + _PAIRS // _MAX_CANDIDATES)
        total = int(counts[part].sum())
        if total:
            within = np.arange(total) - np.repeat(np.cumsum(counts[part]) - counts[part], counts[part])
            yield np.repeat(mine[part], counts[part]), order[np.repeat(low[part], counts[part]) + within]


@dataclass(frozen=True, slots=True)
class Decision:
    """Fates of a domain's documents, uint8, and how many it shares with each earlier domain."""

    fates: np.ndarray
    shared: dict[str, int]


def decide_fates(
    documents: DocumentSet,
    earlier: Sequence[DocumentSet],
    *,
    dev_fraction: float,
    test_fraction: float,
    near_duplicate_threshold: float,
) -> Decision:
    """Apply the rules of this module to ``documents``.

    Args:
        documents: The domain; its fates are not read.
        earlier: Domains that were prepared before, with fates; they stay as they are.
        dev_fraction: Share of documents for dev.
        test_fraction: Share of documents for test.
        near_duplicate_threshold: Jaccard similarity; 1 looks for equal texts only.
    """
    keys = documents.hashes if documents.split_keys is None else documents.split_keys
    fates = split_of(keys, dev_fraction=dev_fraction, test_fraction=test_fraction)
    fates[repeated(documents.hashes)] = Fate.exact_duplicate
    shared: dict[str, int] = {}
    for other in earlier:
        known = np.isin(documents.hashes, other.hashes[other.fates <= Fate.test]) & (fates <= Fate.test)
        fates[known] = Fate.exact_duplicate
        if known.any():
            shared[other.domain] = int(known.sum())
    if near_duplicate_threshold < 1:
        _drop_near_copies(documents, earlier, fates, near_duplicate_threshold)
    return Decision(fates, shared)


def _drop_near_copies(
    documents: DocumentSet, earlier: Sequence[DocumentSet], fates: np.ndarray, threshold: float
) -> None:
    def is_train(of: np.ndarray) -> np.ndarray:
        return of == Fate.train

    def is_held_out(of: np.ndarray) -> np.ndarray:
        return (of == Fate.dev) | (of == Fate.test)

    known = [other for other in earlier if len(other.signatures)]
    rounds = [(is_train, is_held_out, other.signatures, other.fates) for other in known]
    rounds += [(is_held_out, is_train, other.signatures, other.fates) for other in known]
    rounds += [(is_held_out, is_train, documents.signatures, fates)]
    for choose, against, signatures, other_fates in rounds:
        chosen, rows = np.flatnonzero(choose(fates)), np.flatnonzero(against(other_fates))
        for start in range(0, len(chosen), _CHUNK_ROWS):
            part = chosen[start : start + _CHUNK_ROWS]
            copies = near_copies(documents.signatures[part], signatures, rows, threshold)
            fates[part[copies]] = Fate.near_duplicate
