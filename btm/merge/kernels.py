"""Weighted sums of raw tensor bytes in numpy, with buffers that stay in a core's cache.

A kernel averages one chunk at a time: the caller fills ``raw`` with a model's bytes and calls :meth:`Kernel.add`, model
after model in manifest order, then :meth:`Kernel.finish`. Models of equal weight are summed without multiplications and
divided once, so that the mean of identical models has their very bits; all roundings are IEEE, to nearest even.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]
_HIGH_HALF = np.uint32(0xFFFF0000)
_HALF_BITS = np.uint32(16)
_ONE = np.uint32(1)
_JUST_BELOW_HALF = np.uint32(0x7FFF)


class Kernel(Protocol):
    """Accumulates one chunk over models."""

    raw: Array
    """uint8 buffer that receives the bytes of the next model's chunk."""

    def begin(self, num_bytes: int) -> None:
        """Start a chunk of ``num_bytes``, at most ``len(raw)``."""
        ...

    def add(self, weight: float | None) -> None:
        """Add the model in ``raw``; None stands for equal weights, the same in all calls for a chunk."""
        ...

    def finish(self, num_models: int, out: Array) -> bool:
        """Write the average to ``out`` (uint8); ``num_models`` divides sums of equal weights. True if it is finite."""
        ...


class PairedBfloat16:
    """bfloat16, two values to a 32-bit word: each half becomes a float32 by one shift or mask.

    The sum is kept in float32. For K identical values it is exact up to K = 65,536.
    """

    def __init__(self, chunk_bytes: int) -> None:
        words = chunk_bytes // 4
        self.raw = np.zeros(chunk_bytes, np.uint8)
        self._words = self.raw.view(np.uint32)
        self._half = np.empty(words, np.uint32)
        self._sums = np.empty((2, words), np.float32)
        self._count = 0
        self._fresh = True

    def begin(self, num_bytes: int) -> None:
        """Start a chunk; a last odd value is paired with zero."""
        self._count = -(-num_bytes // 4)
        self.raw[num_bytes : 4 * self._count] = 0
        self._fresh = True

    def add(self, weight: float | None) -> None:
        """Add the model in ``raw``."""
        words, half = self._words[: self._count], self._half[: self._count]
        for split, constant, total in (
            (np.left_shift, _HALF_BITS, self._sums[0, : self._count]),
            (np.bitwise_and, _HIGH_HALF, self._sums[1, : self._count]),
        ):
            target = total.view(np.uint32) if self._fresh else half
            split(words, constant, out=target)
            values = target.view(np.float32)
            if weight is not None:
                np.multiply(values, np.float32(weight), out=values)
            if not self._fresh:
                np.add(total, values, out=total)
        self._fresh = False

    def finish(self, num_models: int, out: Array) -> bool:
        """Divide, round and pack."""
        half, finite = self._half[: self._count], True
        for total in self._sums[:, : self._count]:
            if num_models > 1:
                np.divide(total, np.float32(num_models), out=total)
            finite = finite and bool(np.isfinite(total).all())
            bits = total.view(np.uint32)
            np.right_shift(bits, _HALF_BITS, out=half)
            np.bitwise_and(half, _ONE, out=half)
            np.add(half, _JUST_BELOW_HALF, out=half)
            np.add(bits, half, out=bits)
        low, high = self._sums[0, : self._count].view(np.uint32), self._sums[1, : self._count].view(np.uint32)
        np.right_shift(low, _HALF_BITS, out=low)
        np.bitwise_and(high, _HIGH_HALF, out=high)
        np.bitwise_or(low, high, out=low)
        out[:] = low.view(np.uint8)[: len(out)]
        return finite


class Widened:
    """float16 summed in float32, or float32 summed in float64."""

    def __init__(self, chunk_bytes: int, narrow: type[np.floating], wide: type[np.floating]) -> None:
        self.raw = np.zeros(chunk_bytes, np.uint8)
        self._narrow = self.raw.view(narrow)
        self._value = np.empty(len(self._narrow), wide)
        self._sum = np.empty(len(self._narrow), wide)
        self._count = 0
        self._fresh = True

    def begin(self, num_bytes: int) -> None:
        """Start a chunk."""
        self._count = num_bytes // self._narrow.itemsize
        self._fresh = True

    def add(self, weight: float | None) -> None:
        """Add the model in ``raw``."""
        total = self._sum[: self._count]
        value = total if self._fresh else self._value[: self._count]
        np.copyto(value, self._narrow[: self._count])
        if weight is not None:
            np.multiply(value, value.dtype.type(weight), out=value)
        if not self._fresh:
            np.add(total, value, out=total)
        self._fresh = False

    def finish(self, num_models: int, out: Array) -> bool:
        """Divide and round."""
        total = self._sum[: self._count]
        if num_models > 1:
            np.divide(total, total.dtype.type(num_models), out=total)
        result = self._narrow[: self._count]
        np.copyto(result, total, casting="unsafe")
        out[:] = self.raw[: len(out)]
        return bool(np.isfinite(result).all())


class Incremental:
    """float64 by the running mean ``m -= (m - x) * w / W``, exact for identical models without a wider type."""

    def __init__(self, chunk_bytes: int) -> None:
        self.raw = np.zeros(chunk_bytes, np.uint8)
        self._value = self.raw.view(np.float64)
        self._mean = np.empty(len(self._value), np.float64)
        self._count = 0
        self._total_weight = 0.0

    def begin(self, num_bytes: int) -> None:
        """Start a chunk."""
        self._count = num_bytes // 8
        self._total_weight = 0.0

    def add(self, weight: float | None) -> None:
        """Move the mean towards the model in ``raw``."""
        value, mean = self._value[: self._count], self._mean[: self._count]
        weight = 1.0 if weight is None else weight
        if not self._total_weight:
            mean[:] = value
        else:
            # In this order of signs a mean of -0 stays -0.
            np.subtract(mean, value, out=value)
            np.multiply(value, weight / (self._total_weight + weight), out=value)
            np.subtract(mean, value, out=mean)
        self._total_weight += weight

    def finish(self, num_models: int, out: Array) -> bool:
        """Copy the mean out."""
        mean = self._mean[: self._count]
        out[:] = mean.view(np.uint8)
        return bool(np.isfinite(mean).all())


KERNELS: Mapping[str, Callable[[int], Kernel]] = {
    "BF16": PairedBfloat16,
    "F16": lambda chunk_bytes: Widened(chunk_bytes, np.float16, np.float32),
    "F32": lambda chunk_bytes: Widened(chunk_bytes, np.float32, np.float64),
    "F64": Incremental,
}
"""Type of the tensors -> kernel; tensors of all other types must be equal and are copied."""


def decode(raw: Array, dtype: str) -> Array:
    """Floating-point bytes as float64, shape ``(values,)``."""
    if dtype == "BF16":
        return (raw.view(np.uint16).astype(np.uint32) << _HALF_BITS).view(np.float32).astype(np.float64)
    return raw.view({"F16": np.float16, "F32": np.float32, "F64": np.float64}[dtype]).astype(np.float64)


def encode(values: Array, dtype: str) -> Array:
    """float64 values as bytes of ``dtype``; finite values only."""
    if dtype == "BF16":
        bits = values.astype(np.float32).view(np.uint32)
        rounded = bits + _JUST_BELOW_HALF + ((bits >> _HALF_BITS) & _ONE)
        return (rounded >> _HALF_BITS).astype(np.uint16).view(np.uint8)
    return values.astype({"F16": np.float16, "F32": np.float32, "F64": np.float64}[dtype]).view(np.uint8)


def careful_mean(values: Sequence[Array], weights: Sequence[float]) -> Array:
    """Weighted mean of float64 arrays that cannot overflow before the mean itself does.

    Where all models hold one value, infinite or not, that value is the mean.
    """
    share = np.asarray(weights, np.float64) / np.sum(weights)
    mean = sum((value * part for value, part in zip(values[1:], share[1:], strict=True)), values[0] * share[0])
    same = np.all([value == values[0] for value in values], axis=0)
    return np.where(same, values[0], mean)
