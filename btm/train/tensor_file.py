"""Safetensors files, written and read without a second copy of the tensors in memory.

The format is eight bytes of header length, a JSON header, and the tensors one after the other
(https://github.com/huggingface/safetensors). Only fp32 is written here: master weights and Adam moments. Writing hashes
what it writes, tensor by tensor; reading goes straight into the destination. Tensors that are divided over processes
are written whole, one at a time, and each process reads its own part.
"""

import json
import os
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch
import xxhash

from btm.errors import CheckpointError
from btm.schema import Model
from btm.train.divided_tensor import DividedTensor

_ALIGNMENT = 64
_CHUNK_BYTES = 8 << 20
_MAX_HEADER_BYTES = 100 << 20


class TensorFileDigest(Model):
    """Size and xxh3-128 of every byte of one safetensors file."""

    bytes: int
    header: str
    tensors: dict[str, str]


Tensors = Mapping[str, torch.Tensor | DividedTensor]
"""Tensor name -> contiguous fp32 tensor, whole or divided."""


def write_tensors(path: Path, tensors: Tensors) -> TensorFileDigest:
    """Write contiguous fp32 tensors to the new file ``path`` and fsync it.

    Where tensors are divided, the other processes take part (:func:`btm.train.divided_tensor.contribute_all`).

    Raises:
        OSError: If the disk is full.
    """
    header = _header(tensors)
    digests = {}
    size = len(header)
    with open(path, "wb", buffering=0) as file:
        _write_all(file, memoryview(header))
        for name, tensor in tensors.items():
            data = _bytes_of(tensor.whole() if isinstance(tensor, DividedTensor) else tensor.detach().cpu())
            _write_all(file, data)
            digests[name] = xxhash.xxh3_128_hexdigest(data)
            size += len(data)
        os.fsync(file.fileno())
    return TensorFileDigest(bytes=size, header=xxhash.xxh3_128_hexdigest(header), tensors=digests)


def damage_of(path: Path, expected: TensorFileDigest) -> str | None:
    """Read every byte of a file and say what differs from ``expected``; None when nothing does."""
    try:
        size = path.stat().st_size
        if size != expected.bytes:
            return f"{path.name} has {size} bytes, expected {expected.bytes}"
        with open(path, "rb", buffering=0) as file:
            header = _read_header(file)
            if xxhash.xxh3_128_hexdigest(header) != expected.header:
                return f"the header of {path.name} has changed"
            for name, (begin, end) in _extents(header):
                if _hash_range(file, len(header) + begin, end - begin) != expected.tensors.get(name):
                    return f"{name} in {path.name} has changed"
    except FileNotFoundError:
        return f"{path.name} is missing"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{path.name} cannot be read ({error})"
    return None


def read_tensors(path: Path, destination: Tensors) -> None:
    """Fill contiguous fp32 tensors, of divided ones this process's part, from a file that :func:`write_tensors` wrote.

    Raises:
        CheckpointError: If the file's tensors and ``destination`` differ in names or shapes.
    """
    with open(path, "rb", buffering=0) as file:
        header = _read_header(file)
        entries = json.loads(header[8:])
        _check_names(path, {name: tuple(entry["shape"]) for name, entry in entries.items()}, destination)
        for name, wanted in destination.items():
            begin, _ = entries[name]["data_offsets"]
            is_divided = isinstance(wanted, DividedTensor)
            tensor, skipped = (wanted.local, 4 * wanted.local_offset) if is_divided else (wanted, 0)
            if tensor is None:
                continue
            file.seek(len(header) + begin + skipped)
            if tensor.device.type == "cpu":
                _read_all(file, _bytes_of(tensor))
            else:
                staging = torch.empty(tensor.shape, dtype=tensor.dtype)
                _read_all(file, _bytes_of(staging))
                tensor.copy_(staging)


def _header(tensors: Tensors) -> bytes:
    entries: dict[str, Any] = {}
    offset = 0
    for name, tensor in tensors.items():
        if not isinstance(tensor, DividedTensor) and (tensor.dtype != torch.float32 or not tensor.is_contiguous()):
            raise ValueError(f"{name} is {tensor.dtype}, strides {tensor.stride()}; only contiguous fp32 is written")
        end = offset + 4 * tensor.numel()
        entries[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % _ALIGNMENT)
    return struct.pack("<Q", len(text)) + text


def _read_header(file: BinaryIO | Any) -> bytes:
    length = file.read(8)
    (size,) = struct.unpack("<Q", length) if len(length) == 8 else (0,)
    if not 2 <= size <= _MAX_HEADER_BYTES:
        raise ValueError(f"a header of {size} bytes")
    text = bytearray(size)
    _read_all(file, memoryview(text))
    return length + bytes(text)


def _extents(header: bytes) -> Iterator[tuple[str, tuple[int, int]]]:
    for name, entry in json.loads(header[8:]).items():
        begin, end = entry["data_offsets"]
        yield name, (begin, end)


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    return memoryview(cast(Any, tensor.reshape(-1).numpy())).cast("B") if tensor.numel() else memoryview(b"")


def _write_all(file: Any, data: memoryview) -> None:
    while data:
        data = data[file.write(data) :]


def _read_all(file: Any, data: memoryview) -> None:
    while data:
        count = file.readinto(data)
        if not count:
            raise ValueError("the file ends too early")
        data = data[count:]


def _hash_range(file: Any, offset: int, length: int) -> str:
    digest = xxhash.xxh3_128()
    buffer = memoryview(bytearray(min(length, _CHUNK_BYTES)))
    file.seek(offset)
    while length:
        part = buffer[: min(length, len(buffer))]
        _read_all(file, part)
        digest.update(part)
        length -= len(part)
    return digest.hexdigest()


def _check_names(path: Path, found: Mapping[str, tuple[int, ...]], destination: Tensors) -> None:
    wanted = {name: tuple(tensor.shape) for name, tensor in destination.items()}
    if found == wanted:
        return
    missing = sorted(wanted.keys() - found.keys())
    extra = sorted(found.keys() - wanted.keys())
    other = sorted(name for name in wanted.keys() & found.keys() if wanted[name] != found[name])
    parts = [
        *(f"{name} is missing" for name in missing[:2]),
        *(f"{name} is not in the model" for name in extra[:2]),
        *(f"{name} has shape {found[name]}, the model has {wanted[name]}" for name in other[:2]),
    ]
    raise CheckpointError(
        f"{path} belongs to another model: {'; '.join(parts)} ({len(missing) + len(extra) + len(other)} differences); "
        f"use the model settings that it was trained with"
    )
