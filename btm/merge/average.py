"""The streaming engine: one pass over the tensors of all models, in pieces, into safetensors files.

Neighbouring tensors of one type that lie in the same order in every file are read as one run of bytes. Pieces are
averaged by a few threads (numpy and the kernel's reads release the interpreter) and written in order, so the result
depends neither on the number of threads nor on the size of the pieces.
"""

import bisect
import hashlib
import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from btm.errors import MergeError
from btm.merge.kernels import KERNELS, Array, Kernel, careful_mean, decode, encode
from btm.merge.model_files import ModelFiles
from btm.merge.tensor_file import DTYPE_BYTES, Tensor

MAX_THREADS = 4
_CHUNK_BYTES = 256 << 10
_SMALLEST_CHUNK_BYTES = 4 << 10
_CHUNKS_PER_PIECE = 8
_CHUNKS_PER_WORKSPACE = 32
"""A piece of eight chunks, and at most five scratch chunks for each of the four kernels."""


@dataclass(frozen=True, slots=True)
class Run:
    """Bytes of one type that lie without gaps in every model."""

    dtype: str
    sources: tuple[tuple[Path, int], ...]
    """File and offset of the first byte, per model."""
    num_bytes: int
    names: tuple[str, ...]
    begins: tuple[int, ...]
    """Where each tensor of ``names`` begins within the run."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Part of a run that one thread averages at once."""

    run: Run
    begin: int
    num_bytes: int


@dataclass(slots=True)
class Workspace:
    """Buffers of one piece in progress."""

    chunk_bytes: int
    out: Array
    kernels: dict[str, Kernel] = field(default_factory=dict)

    def kernel(self, dtype: str) -> Kernel:
        """The kernel of a type; its buffers are made when it is first used."""
        if dtype not in self.kernels:
            self.kernels[dtype] = KERNELS[dtype](self.chunk_bytes)
        return self.kernels[dtype]


def canonical_order(tensors: Mapping[str, Tensor]) -> list[str]:
    """Names by size of their type, largest first, then alphabetically: the order in which safetensors writes them."""
    return sorted(tensors, key=lambda name: (-DTYPE_BYTES[tensors[name].dtype], tensors[name].dtype, name))


def plan_runs(names: Sequence[str], models: Sequence[ModelFiles]) -> list[Run]:
    """Join tensors that follow each other in every model's file; ``names`` gives the order of the output."""
    runs: list[Run] = []
    pending: list[str] = []
    begins: list[int] = []
    start: tuple[tuple[Path, int], ...] = ()
    total = 0

    def close() -> None:
        if pending:
            dtype = models[0].tensors[pending[0]].dtype
            runs.append(Run(dtype, start, total, tuple(pending), tuple(begins)))

    for name in names:
        tensors = [model.tensors[name] for model in models]
        sources = tuple((tensor.path, tensor.offset) for tensor in tensors)
        joins = pending and models[0].tensors[pending[-1]].dtype == tensors[0].dtype
        if not joins or not _follows(start, total, sources):
            close()
            pending, begins, start, total = [], [], sources, 0
        pending.append(name)
        begins.append(total)
        total += tensors[0].num_bytes
    close()
    return runs


def stream_average(
    runs: Sequence[Run],
    weights: Sequence[float],
    write: Callable[[memoryview], None],
    *,
    memory_bytes: int,
    num_threads: int,
) -> None:
    """Average all runs and hand the bytes to ``write`` in order.

    Args:
        runs: What to read; every run has one source per weight.
        weights: Positive weights that sum to 1, in the order of accumulation.
        write: Receives the output piece by piece; the memory is reused when it returns.
        memory_bytes: Bound on all buffers together (at least a few hundred kilobytes are used).
        num_threads: Threads that average.

    Raises:
        MergeError: If a model holds NaN, a value is infinite in some models only, whole numbers differ, or a file ends
            too early.
    """
    equal = all(weight == weights[0] for weight in weights)
    factors: Sequence[float | None] = [None] * len(weights) if equal else list(weights)
    spaces = num_threads + 2
    chunk = min(_CHUNK_BYTES, max(_SMALLEST_CHUNK_BYTES, memory_bytes // (_CHUNKS_PER_WORKSPACE * spaces)))
    chunk -= chunk % _SMALLEST_CHUNK_BYTES
    free = [Workspace(chunk, np.empty(chunk * _CHUNKS_PER_PIECE, np.uint8)) for _ in range(spaces)]
    pending: deque[tuple[Future[None], Workspace, int]] = deque()

    def finish_oldest() -> None:
        future, workspace, num_bytes = pending.popleft()
        future.result()
        write(workspace.out[:num_bytes].data)
        free.append(workspace)

    with ThreadPoolExecutor(num_threads) as pool:
        for piece in _pieces(runs, chunk * _CHUNKS_PER_PIECE):
            if not free:
                finish_oldest()
            workspace = free.pop()
            pending.append(
                (pool.submit(_average_piece, piece, factors, weights, workspace), workspace, piece.num_bytes)
            )
        while pending:
            finish_oldest()


def write_tensors(
    path: Path,
    header: bytes,
    runs: Sequence[Run],
    weights: Sequence[float],
    *,
    memory_bytes: int,
    num_threads: int,
) -> str:
    """Write one safetensors file.

    Returns:
        SHA-256 of the file.
    """
    digest = hashlib.sha256()
    with open(path, "wb", buffering=0) as file:

        def write(data: memoryview) -> None:
            digest.update(data)
            while data:
                data = data[file.write(data) :]

        write(memoryview(header))
        stream_average(runs, weights, write, memory_bytes=memory_bytes, num_threads=num_threads)
    return digest.hexdigest()


def default_threads() -> int:
    """Threads that averaging can use on this machine."""
    return min(MAX_THREADS, len(os.sched_getaffinity(0)))


def _follows(start: tuple[tuple[Path, int], ...], num_bytes: int, sources: tuple[tuple[Path, int], ...]) -> bool:
    return all(
        path == first and offset == begin + num_bytes
        for (first, begin), (path, offset) in zip(start, sources, strict=True)
    )


def _pieces(runs: Sequence[Run], piece_bytes: int) -> Iterator[Piece]:
    for run in runs:
        for begin in range(0, run.num_bytes, piece_bytes):
            yield Piece(run, begin, min(piece_bytes, run.num_bytes - begin))


def _average_piece(
    piece: Piece, factors: Sequence[float | None], weights: Sequence[float], workspace: Workspace
) -> None:
    average = _average_chunk if piece.run.dtype in KERNELS else _copy_chunk
    with ExitStack() as stack, np.errstate(all="ignore"):
        # Opened anew for each piece: hundreds of shards must not use up the descriptors of the process.
        files = [stack.enter_context(open(path, "rb", buffering=0)).fileno() for path, _ in piece.run.sources]
        for begin in range(0, piece.num_bytes, workspace.chunk_bytes):
            part = Piece(piece.run, piece.begin + begin, min(workspace.chunk_bytes, piece.num_bytes - begin))
            average(part, files, factors, weights, workspace, workspace.out[begin : begin + part.num_bytes])


def _average_chunk(
    part: Piece,
    files: Sequence[int],
    factors: Sequence[float | None],
    weights: Sequence[float],
    workspace: Workspace,
    out: Array,
) -> None:
    kernel = workspace.kernel(part.run.dtype)
    kernel.begin(part.num_bytes)
    for index, factor in enumerate(factors):
        _read(files[index], part, index, kernel.raw)
        kernel.add(factor)
    if not kernel.finish(len(factors) if factors[0] is None else 1, out):
        _repair(part, files, weights, out)


def _copy_chunk(
    part: Piece,
    files: Sequence[int],
    factors: Sequence[float | None],
    weights: Sequence[float],
    workspace: Workspace,
    out: Array,
) -> None:
    """Whole numbers and truth values: not averaged, but equal in every model."""
    _read(files[0], part, 0, out)
    other = np.empty_like(out)
    for index in range(1, len(files)):
        _read(files[index], part, index, other)
        if not np.array_equal(out, other):
            position = int(np.flatnonzero(out != other)[0])
            raise MergeError(
                f"tensor {_name_at(part, position)!r} of {part.run.dtype} differs between {part.run.sources[0][0]} and "
                f"{part.run.sources[index][0]}; tensors of whole numbers cannot be averaged and must be equal"
            )


def _repair(part: Piece, files: Sequence[int], weights: Sequence[float], out: Array) -> None:
    """Give values whose sum is not finite their mean, or say which model is to blame."""
    size = DTYPE_BYTES[part.run.dtype]
    values = []
    for index in range(len(files)):
        raw = np.empty(part.num_bytes, np.uint8)
        _read(files[index], part, index, raw)
        values.append(decode(raw, part.run.dtype))
    for index, value in enumerate(values):
        if (bad := np.flatnonzero(np.isnan(value))).size:
            raise MergeError(_bad_value(part, index, int(bad[0]) * size, "NaN"))
    mean = careful_mean(values, weights)
    same = np.all([value == values[0] for value in values], axis=0)
    for index, value in enumerate(values):
        if (bad := np.flatnonzero(np.isinf(value) & ~same)).size:
            raise MergeError(_bad_value(part, index, int(bad[0]) * size, "an infinite value"))
    wrong = ~np.isfinite(decode(out, part.run.dtype))
    out.reshape(-1, size)[wrong] = encode(mean[wrong], part.run.dtype).reshape(-1, size)


def _read(file: int, part: Piece, index: int, buffer: Array) -> None:
    path, offset = part.run.sources[index]
    target, position = buffer[: part.num_bytes].data, offset + part.begin
    while target:
        count = os.preadv(file, [target], position)
        if not count:
            raise MergeError(f"{path} ends at byte {position}, in the middle of a tensor; restore it from a copy")
        target, position = target[count:], position + count


def _bad_value(part: Piece, index: int, offset: int, what: str) -> str:
    path = part.run.sources[index][0]
    name = _name_at(part, offset)
    within = (part.begin + offset - part.run.begins[part.run.names.index(name)]) // DTYPE_BYTES[part.run.dtype]
    return f"{path} holds {what} in tensor {name!r} at element {within}; leave this model out or train it again"


def _name_at(part: Piece, offset: int) -> str:
    return part.run.names[bisect.bisect_right(part.run.begins, part.begin + offset) - 1]
