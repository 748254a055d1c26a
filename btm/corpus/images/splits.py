"""Splits by picture: all documents that show a picture first are in one split, and no picture is trained and tested on.

Two rules beside those of :mod:`btm.corpus.dedup`:

1. The split of a document with pictures depends on its first picture alone.
2. A held-out document that shows a picture of a training document is dropped, in the same domain and across domains; of
   two domains the later one gives way.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from btm.corpus.dedup import Fate
from btm.corpus.images.marks import pictures_in
from btm.errors import DataError
from btm.records import PICTURES_FILE

Shown = np.ndarray
"""Which document shows which picture: uint64 ``(pairs, 2)`` of document number and first 64 bits of the hash."""


def shown_pictures(texts: Iterable[tuple[int, str]]) -> tuple[Shown, dict[str, None]]:
    """Pictures of documents given as number and marked text.

    Returns:
        The pairs in the order of the documents, and the full hashes of all pictures, each once, in order.
    """
    pairs: list[tuple[int, int]] = []
    hashes: dict[str, None] = {}
    for number, text in texts:
        for found in pictures_in(text):
            pairs.append((number, int(found[:16], 16)))
            hashes[found] = None
    return np.array(pairs, dtype=np.uint64).reshape(-1, 2), hashes


def split_keys(text_hashes: np.ndarray, shown: Shown) -> np.ndarray:
    """What the split of each document depends on: its first picture, or its text where there is none; uint64."""
    keys = text_hashes.copy()
    documents, first = np.unique(shown[:, 0], return_index=True)
    keys[documents.astype(np.int64)] = shown[first, 1]
    return keys


def drop_shared_pictures(fates: np.ndarray, shown: Shown, others: Sequence[tuple[np.ndarray, Shown]]) -> np.ndarray:
    """Apply rule 2.

    Args:
        fates: Of a domain's documents, uint8 ``(documents,)``.
        shown: Its pictures.
        others: Fates and pictures of the domains before it; they stay as they are.

    Returns:
        The new fates.
    """
    fates = fates.copy()
    for other_fates, other_shown in others:
        _drop(fates, shown, _is_train(fates), _of(other_shown, _is_held_out(other_fates)))
        _drop(fates, shown, _is_held_out(fates), _of(other_shown, _is_train(other_fates)))
    _drop(fates, shown, _is_held_out(fates), _of(shown, _is_train(fates)))
    return fates


def save_shown(shown: Shown, directory: Path) -> None:
    """Put the pictures of a domain beside its shards."""
    np.save(directory / PICTURES_FILE, shown, allow_pickle=False)


def load_shown(directory: Path) -> Shown:
    """Pictures of the prepared domain in ``directory``; none for a domain of text alone.

    Raises:
        DataError: If the file is damaged.
    """
    path = directory / PICTURES_FILE
    if not path.is_file():
        return np.zeros((0, 2), dtype=np.uint64)
    try:
        found = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{path} cannot be read ({error}); remove {directory} and prepare it again") from None
    if found.dtype != np.uint64 or found.ndim != 2 or found.shape[1] != 2:
        raise DataError(f"{path} is {found.dtype} {found.shape}; remove {directory} and prepare it again")
    return found


def _is_train(fates: np.ndarray) -> np.ndarray:
    return fates == Fate.train


def _is_held_out(fates: np.ndarray) -> np.ndarray:
    return (fates == Fate.dev) | (fates == Fate.test)


def _of(shown: Shown, documents: np.ndarray) -> np.ndarray:
    """Pictures of the chosen documents (bool per document)."""
    return shown[documents[shown[:, 0].astype(np.int64)], 1]


def _drop(fates: np.ndarray, shown: Shown, chosen: np.ndarray, pictures: np.ndarray) -> None:
    document = shown[:, 0].astype(np.int64)
    hit = document[chosen[document] & np.isin(shown[:, 1], pictures)]
    fates[hit] = Fate.near_duplicate
