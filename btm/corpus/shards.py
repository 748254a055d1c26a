"""Token shards in the indexed format of Megatron: ``<prefix>.bin``, ``<prefix>.idx`` and ``<prefix>.bytes.npy``.

The ``.bin`` file holds the token ids of all documents one after the other; the ``.idx`` file holds where each begins.
Megatron-LM, NeMo and others read both; ``.bytes.npy`` is ours and holds the UTF-8 bytes of each document's text, for
bits per byte. Files appear under their names only when complete, the ``.idx`` file last.
"""

import contextlib
import io
import os
import struct
from array import array
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from btm.errors import DataError
from btm.files import fsync_directory

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
SUFFIXES = (".bin", ".bytes.npy", ".idx")
_HEADER_BYTES = 34
_DTYPES: dict[int, Any] = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}
_UINT16_VOCABULARY = 65_500
_MAX_DOCUMENT_TOKENS = 2**31 - 1


def token_dtype(vocab_size: int) -> np.dtype:
    """Smallest type of the format that holds the ids of a vocabulary, by Megatron's rule."""
    return np.dtype(np.uint16 if vocab_size < _UINT16_VOCABULARY else np.int32)


def shard_paths(prefix: Path | str) -> list[Path]:
    """The files of the shard ``prefix``, in the order in which they are put in place."""
    return [Path(f"{prefix}{suffix}") for suffix in SUFFIXES]


class ShardWriter:
    """Write documents to a shard; use as a context manager.

    Leaving the block puts the files in place; leaving it by an exception leaves nothing. Memory grows by 20 bytes per
    document only.
    """

    def __init__(self, prefix: Path | str, vocab_size: int) -> None:
        self._paths = shard_paths(prefix)
        self._temporary = [path.with_name(f".tmp-{path.name}-{os.getpid()}") for path in self._paths]
        self._vocab_size = vocab_size
        self._dtype = token_dtype(vocab_size)
        self._lengths = array("q")
        self._bytes = array("q")

    def __enter__(self) -> Self:
        self._paths[0].parent.mkdir(parents=True, exist_ok=True)
        self._bin = open(self._temporary[0], "wb", buffering=1 << 20)
        return self

    def add(self, ids: np.ndarray, num_bytes: int) -> None:
        """Append one document.

        Args:
            ids: Token ids ``(tokens,)`` including the final end-of-text token; at least one.
            num_bytes: Length of the document's text in UTF-8 bytes.

        Raises:
            DataError: If there is no token, or one is outside the vocabulary.
        """
        if not 0 < len(ids) <= _MAX_DOCUMENT_TOKENS:
            raise DataError(f"a document has {len(ids)} tokens, allowed are 1 to {_MAX_DOCUMENT_TOKENS}")
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= self._vocab_size:
            raise DataError(f"token id {low if low < 0 else high} is outside the vocabulary of {self._vocab_size}")
        self._bin.write(np.ascontiguousarray(ids, dtype=self._dtype).data)
        self._lengths.append(len(ids))
        self._bytes.append(num_bytes)

    @property
    def num_documents(self) -> int:
        """Documents added so far."""
        return len(self._lengths)

    @property
    def num_tokens(self) -> int:
        """Tokens added so far."""
        return sum(self._lengths)

    @property
    def num_bytes(self) -> int:
        """Text bytes added so far."""
        return sum(self._bytes)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            self._bin.close()
            for path in self._temporary:
                with contextlib.suppress(FileNotFoundError):
                    path.unlink()

    def _finish(self) -> None:
        self._bin.flush()
        os.fsync(self._bin.fileno())
        sizes = io.BytesIO()
        np.save(sizes, np.frombuffer(self._bytes, dtype=np.int64), allow_pickle=False)
        for path, content in zip(self._temporary[1:], (sizes.getvalue(), self._index()), strict=True):
            with open(path, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        # An old index must never describe a new .bin file.
        self._paths[-1].unlink(missing_ok=True)
        for temporary, path in zip(self._temporary, self._paths, strict=True):
            os.replace(temporary, path)
        fsync_directory(self._paths[0].parent)

    def _index(self) -> bytes:
        lengths = np.frombuffer(self._lengths, dtype=np.int64)
        pointers = np.zeros(len(lengths), dtype=np.int64)
        np.cumsum(lengths[:-1] * self._dtype.itemsize, out=pointers[1:])
        code = next(code for code, dtype in _DTYPES.items() if dtype == self._dtype)
        header = MAGIC + struct.pack("<QBQQ", VERSION, code, len(lengths), len(lengths) + 1)
        documents = np.arange(len(lengths) + 1, dtype=np.int64)
        return b"".join([header, lengths.astype("<i4").tobytes(), pointers.tobytes(), documents.tobytes()])


class TokenShard:
    """A shard opened for reading by memory map; shards that Megatron's own tools wrote are read too.

    Attributes:
        prefix: Path without suffix.
        tokens: Ids of all documents one after the other, memory-mapped ``(num_tokens,)``.
        lengths: Tokens of each document, int64 ``(num_documents,)``.
        starts: Position of each document's first token in ``tokens``, int64 ``(num_documents,)``.
    """

    def __init__(self, prefix: Path | str) -> None:
        """Open the shard ``prefix``.

        Raises:
            DataError: If a file is missing, damaged or of another format.
        """
        self.prefix = Path(prefix)
        self._bytes: np.ndarray | None = None
        path = Path(f"{prefix}.idx")
        try:
            raw = np.fromfile(path, dtype=np.uint8)
            dtype, self.lengths, self.starts = _parse_index(path, raw)
            self.tokens = _map_tokens(Path(f"{prefix}.bin"), dtype)
        except FileNotFoundError as error:
            raise DataError(f"token shard {prefix}: {error.filename} is missing; prepare the corpus again") from None
        expected = int(self.lengths.sum())
        if len(self.tokens) != expected:
            raise DataError(
                f"{prefix}.bin has {len(self.tokens)} tokens, its index says {expected}; prepare the corpus again"
            )

    @property
    def num_documents(self) -> int:
        """Documents in the shard."""
        return len(self.lengths)

    @property
    def num_tokens(self) -> int:
        """Tokens in the shard, end-of-text tokens included."""
        return len(self.tokens)

    @property
    def bytes(self) -> np.ndarray:
        """UTF-8 bytes of each document's text, int64 ``(num_documents,)``.

        Raises:
            DataError: If ``<prefix>.bytes.npy`` is missing or damaged.
        """
        if self._bytes is not None:
            return self._bytes
        path = f"{self.prefix}.bytes.npy"
        try:
            loaded = np.load(path, allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise DataError(f"{path} cannot be read ({error}); prepare the corpus again") from None
        if loaded.shape != self.lengths.shape or loaded.dtype != np.int64:
            raise DataError(f"{path} does not fit {self.prefix}.idx; prepare the corpus again")
        self._bytes = loaded
        return loaded

    def document(self, index: int) -> np.ndarray:
        """Token ids of one document, its final end-of-text token included, ``(lengths[index],)``."""
        start = int(self.starts[index])
        return self.tokens[start : start + int(self.lengths[index])]

    def document_bytes(self, index: int) -> int:
        """UTF-8 bytes of one document's text."""
        return int(self.bytes[index])


def _parse_index(path: Path, raw: np.ndarray) -> tuple[np.dtype, np.ndarray, np.ndarray]:
    if len(raw) < _HEADER_BYTES or raw[: len(MAGIC)].tobytes() != MAGIC:
        raise DataError(f"{path} is not an index of the Megatron indexed format; prepare the corpus again")
    version, code, num_sequences, num_borders = struct.unpack("<QBQQ", raw[len(MAGIC) : _HEADER_BYTES].tobytes())
    if version != VERSION or code not in _DTYPES:
        raise DataError(f"{path} has version {version} and type code {code}; this program reads version 1, integers")
    if len(raw) != _HEADER_BYTES + 12 * num_sequences + 8 * num_borders or num_borders < 1:
        raise DataError(f"{path} has {len(raw)} bytes, which does not fit its header; prepare the corpus again")
    dtype = np.dtype(_DTYPES[code])
    pointers_at = _HEADER_BYTES + 4 * num_sequences
    borders_at = pointers_at + 8 * num_sequences
    lengths = raw[_HEADER_BYTES:pointers_at].view("<i4").astype(np.int64)
    pointers = raw[pointers_at:borders_at].view("<i8")
    borders = raw[borders_at:].view("<i8")
    ends = np.concatenate([[0], np.cumsum(lengths)])
    if not np.array_equal(pointers, ends[:-1] * dtype.itemsize) or (lengths < 0).any():
        raise DataError(f"{path} does not list its documents one after the other; prepare the corpus again")
    if borders[0] != 0 or borders[-1] != num_sequences or (np.diff(borders) < 0).any():
        raise DataError(f"{path} has document borders outside its {num_sequences} sequences; prepare the corpus again")
    starts = ends[borders]
    return dtype, np.diff(starts), starts[:-1]


def _map_tokens(path: Path, dtype: np.dtype) -> np.ndarray:
    size = path.stat().st_size
    if size % dtype.itemsize:
        raise DataError(f"{path} has {size} bytes, not a multiple of {dtype.itemsize}; prepare the corpus again")
    if size == 0:
        return np.zeros(0, dtype=dtype)
    return np.memmap(path, dtype=dtype, mode="r")
