"""Read and write the header of a safetensors file; the file is untrusted and nothing but its bytes is used.

Layout: 8 bytes little-endian length of the header, the header (JSON: tensor name -> dtype, shape, begin and end of its
bytes), then the bytes of all tensors without gaps.
"""

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from btm.errors import MergeError

DTYPE_BYTES: Mapping[str, int] = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "I64": 8,
    "U64": 8,
    "I32": 4,
    "U32": 4,
    "I16": 2,
    "U16": 2,
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
}
"""Types that are read, with their size in bytes."""
MAX_HEADER_BYTES = 32 << 20
"""Longest header that is read: about 300,000 tensors."""
_LENGTH_BYTES = 8
_ALIGNMENT = 64
_METADATA_KEY = "__metadata__"


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor of a file."""

    dtype: str
    shape: tuple[int, ...]
    path: Path
    offset: int
    """Of its first byte in the file."""
    num_bytes: int


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of one safetensors file, in the order of their bytes.

    Raises:
        MergeError: If the file is not a well-formed safetensors file: truncated, header too long or not JSON, unknown
            dtype, sizes that contradict each other, tensors that overlap, leave gaps or end beyond the file.
    """
    header, data_start, file_bytes = _read_header(path)
    header.pop(_METADATA_KEY, None)
    tensors = {name: _parse_entry(path, name, entry, data_start) for name, entry in header.items()}
    ordered = dict(sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].num_bytes)))
    end = data_start
    for name, tensor in ordered.items():
        if tensor.offset != end:
            problem = "overlaps the tensor before it" if tensor.offset < end else "leaves a gap before it"
            raise _damaged(path, f"tensor {name!r} begins at byte {tensor.offset}, expected {end}: it {problem}")
        end += tensor.num_bytes
    if end != file_bytes:
        raise _damaged(path, f"its tensors end at byte {end}, but the file has {file_bytes} bytes")
    return ordered


def format_header(tensors: Sequence[tuple[str, str, Sequence[int]]], metadata: Mapping[str, str]) -> bytes:
    """Header of a file that holds the given tensors one after the other.

    Args:
        tensors: Name, dtype and shape of each, in the order of their bytes.
        metadata: Text entries; readers of transformers want ``format``.

    Returns:
        Everything before the first tensor's bytes; its length is a multiple of 64.
    """
    header: dict[str, Any] = {_METADATA_KEY: dict(metadata)}
    begin = 0
    for name, dtype, shape in tensors:
        end = begin + DTYPE_BYTES[dtype] * math.prod(shape)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + _LENGTH_BYTES) % _ALIGNMENT)
    return len(text).to_bytes(_LENGTH_BYTES, "little") + text


def _read_header(path: Path) -> tuple[dict[str, Any], int, int]:
    if not path.is_file():
        raise MergeError(f"{path} is missing or not a regular file; restore the model directory from a copy")
    with open(path, "rb") as file:
        file_bytes = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
        allowed = min(MAX_HEADER_BYTES, file_bytes - _LENGTH_BYTES)
        if not 2 <= length <= allowed:
            raise _damaged(path, f"its header claims {length} bytes, allowed are 2 to {max(allowed, 2)}")
        text = file.read(length)
    try:
        header = json.loads(text, object_pairs_hook=_refuse_repeated)
    except (ValueError, RecursionError) as error:
        raise _damaged(path, f"its header is not valid JSON ({str(error)[:200]})") from None
    if not isinstance(header, dict):
        raise _damaged(path, "its header is not a JSON object")
    return header, _LENGTH_BYTES + length, file_bytes


def _parse_entry(path: Path, name: str, entry: Any, data_start: int) -> Tensor:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise _damaged(path, f"tensor {name!r} must have exactly dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        raise MergeError(
            f"{path}: tensor {name!r} has dtype {str(dtype)[:40]}, allowed are {', '.join(DTYPE_BYTES)}; convert the "
            f"model to one of these (quantised weights cannot be averaged)"
        )
    if not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2:
        raise _damaged(path, f"tensor {name!r} has a shape or offsets that are not whole numbers from 0")
    begin, end = offsets
    if end - begin != DTYPE_BYTES[dtype] * math.prod(shape):
        raise _damaged(path, f"tensor {name!r} of {dtype} {shape} cannot take bytes {begin} to {end}")
    return Tensor(dtype, tuple(shape), path, data_start + begin, end - begin)


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and len(value) <= 64 and all(type(x) is int and 0 <= x < 2**62 for x in value)


def _refuse_repeated(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key occurs twice")
    return result


def _damaged(path: Path, problem: str) -> MergeError:
    return MergeError(f"{path} is not a sound safetensors file: {problem}; restore it from a copy")
