"""Random choices as hashes: the same on every machine, numpy version and world size."""

import numpy as np
import xxhash

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)


def hash_text(*parts: str) -> int:
    """64-bit hash of some strings; different for different lists of strings."""
    digest = xxhash.xxh3_64()
    for part in parts:
        data = part.encode("utf-8", "surrogatepass")
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return digest.intdigest()


def hash_positions(key: int, positions: np.ndarray) -> np.ndarray:
    """One random 64-bit number per position: SplitMix64 with the stream ``key``.

    Args:
        key: Any 64-bit number; another key is another stream.
        positions: Integers, any shape.

    Returns:
        uint64 numbers of the same shape.
    """
    with np.errstate(over="ignore"):
        state = np.uint64(key) + (positions.astype(np.uint64) + np.uint64(1)) * _GOLDEN
        state = (state ^ (state >> np.uint64(30))) * _MIX_1
        state = (state ^ (state >> np.uint64(27))) * _MIX_2
        return state ^ (state >> np.uint64(31))


def permutation(key: int, count: int) -> np.ndarray:
    """A random order of ``0..count-1`` as int64, the same for the same key."""
    return np.argsort(hash_positions(key, np.arange(count, dtype=np.int64)), kind="stable")
