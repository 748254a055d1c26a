"""Pictures of a domain, read by several threads; each is decoded once per pass, however many documents show it."""

import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from btm.corpus.images.image_tokenizer import ImageTokenizer
from btm.corpus.images.pictures import fit_square, load_picture, picture_hash
from btm.errors import DataError

_BATCH = 256
_Stamp = tuple[int, int]


class PictureIndex:
    """Hash of every picture file seen so far, and where a picture of each hash lies.

    Memory grows by some hundred bytes per picture.

    Attributes:
        bytes_per_picture: What a picture counts for in a document's size, for bits per byte: its raw pixels as the
            models see them.
    """

    def __init__(self, num_workers: int = 0, bytes_per_picture: int = 0) -> None:
        """Start empty.

        Args:
            num_workers: Threads; 0 takes one per core.
            bytes_per_picture: See the attribute.
        """
        self.bytes_per_picture = bytes_per_picture
        self._num_workers = num_workers or len(os.sched_getaffinity(0))
        self._hashes: dict[str, tuple[_Stamp, str]] = {}
        self._files: dict[str, str] = {}

    def look_up(self, paths: Sequence[Path]) -> dict[Path, str | DataError]:
        """Hash of each picture file, or what is wrong with it; a file is read again when its size or time changed."""
        found: dict[Path, str | DataError] = {}
        unknown: list[Path] = []
        for path in dict.fromkeys(paths):
            known = self._hashes.get(str(path))
            if known and known[0] == _stamp(path):
                found[path] = known[1]
            else:
                unknown.append(path)
        if not unknown:
            return found
        with ThreadPoolExecutor(self._num_workers) as pool:
            for path, (stamp, result) in zip(unknown, pool.map(_hash_file, unknown), strict=True):
                found[path] = result
                if isinstance(result, str):
                    self._hashes[str(path)] = stamp, result
                    self._files.setdefault(result, str(path))
        return found

    def pictures(self, hashes: Sequence[str], size: int) -> Iterator[np.ndarray]:
        """Pictures of known hashes, fitted to squares, in batches uint8 ``(B, size, size, 3)``.

        Raises:
            DataError: If a file has changed since it was looked up.
        """

        def load(wanted: str) -> np.ndarray:
            picture = load_picture(self._files[wanted])
            if picture_hash(picture) != wanted:
                raise DataError(f"{self._files[wanted]} changed while its domain was being prepared; run it again")
            return fit_square(picture, size)

        with ThreadPoolExecutor(self._num_workers) as pool:
            for start in range(0, len(hashes), _BATCH):
                yield np.stack(list(pool.map(load, hashes[start : start + _BATCH])))

    def codes(self, hashes: Sequence[str], tokenizer: ImageTokenizer) -> np.ndarray:
        """Image codes of known pictures, int32 ``(pictures, G)``."""
        codes = np.empty((len(hashes), tokenizer.num_patches), dtype=np.int32)
        done = 0
        for batch in self.pictures(hashes, tokenizer.size):
            codes[done : done + len(batch)] = tokenizer.encode(batch)
            done += len(batch)
        return codes


def stamps(paths: Iterable[Path]) -> tuple[int, int, list[list[object]]]:
    """Number and bytes of the picture files, and path, size and modification time (ns) of each.

    A missing file counts with size -1; reading it is what reports it.
    """
    rows = [[str(path), *_stamp(path)] for path in dict.fromkeys(paths)]
    return len(rows), sum(max(0, int(row[1])) for row in rows), rows


def _stamp(path: Path) -> _Stamp:
    try:
        found = path.stat()
    except OSError:
        return -1, -1
    return found.st_size, found.st_mtime_ns


def _hash_file(path: Path) -> tuple[_Stamp, str | DataError]:
    stamp = _stamp(path)
    try:
        return stamp, picture_hash(load_picture(path))
    except DataError as error:
        return stamp, error
