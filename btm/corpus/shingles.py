"""Short signatures of documents, whose agreement estimates how much text two documents share.

A document is the set of its word 5-grams; a signature holds the smallest of 128 hash functions over this set (MinHash,
Broder 1997), 8 bits each (b-bit MinHash, https://arxiv.org/abs/0910.3349). Everything is numpy over whole batches.
"""

from collections.abc import Sequence

import numpy as np
import xxhash

from btm.corpus.randomness import hash_positions

NUM_HASHES = 128
_SHINGLE_WORDS = 5
_CHUNK_SHINGLES = 1 << 14
_SPACE = np.zeros(256, dtype=bool)
_SPACE[list(b" \t\n\r\v\f")] = True
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
_INVERSE = np.uint64(pow(0x9E3779B97F4A7C15, -1, 1 << 64))
_FIRST_LONG_LEAD = 0xE0
"""Characters of three and more UTF-8 bytes are words of their own: such scripts often have no spaces."""
_CONTINUATION = (0x80, 0xC0)


def signatures(texts: Sequence[bytes]) -> np.ndarray:
    """Signature of each text.

    Args:
        texts: UTF-8.

    Returns:
        uint8 ``(texts, 128)``; equal texts have equal signatures, and the share of equal entries of two signatures
        estimates the Jaccard similarity of their sets of word 5-grams.
    """
    if not texts:
        return np.zeros((0, NUM_HASHES), dtype=np.uint8)
    hashes, ends = _shingles(texts)
    factors: np.ndarray = (hash_positions(1, np.arange(NUM_HASHES)) >> np.uint64(32)).astype(np.uint32) | np.uint32(1)
    offsets = (hash_positions(2, np.arange(NUM_HASHES)) >> np.uint64(32)).astype(np.uint32)
    smallest = np.full((NUM_HASHES, len(texts)), np.uint32(0xFFFFFFFF))
    starts = np.concatenate([[0], ends[:-1]])
    for low in range(0, len(hashes), _CHUNK_SHINGLES):
        high = min(low + _CHUNK_SHINGLES, len(hashes))
        first, last = np.searchsorted(ends, low, side="right"), np.searchsorted(starts, high)
        values = hashes[low:high] * factors[:, None] + offsets[:, None]
        found = np.minimum.reduceat(values, np.maximum(starts[first:last], low) - low, axis=1)
        np.minimum(smallest[:, first:last], found, out=smallest[:, first:last])
    mixed = smallest ^ (smallest >> np.uint32(15))
    return np.ascontiguousarray(((mixed * np.uint32(0x2C1B3C6D)) >> np.uint32(24)).astype(np.uint8).T)


def _shingles(texts: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
    """Hashes of all texts' word 5-grams, uint32, and the end of each text's hashes."""
    # A space between texts keeps words apart.
    joined = np.frombuffer(b" ".join([*texts, b""]), dtype=np.uint8)
    text_ends = np.cumsum([len(text) + 1 for text in texts])
    words, word_ends = _words(joined)
    words_until = np.searchsorted(word_ends, text_ends, side="right")
    counts = np.diff(words_until, prepend=0)
    hashes = np.zeros(len(words), dtype=np.uint64)
    for number in range(_SHINGLE_WORDS):
        # Shingles that reach into the next text are dropped below.
        hashes = hashes * _MULTIPLIER + np.roll(words, -number)
    hashes = hash_positions(0, hashes)
    shingles = np.maximum(counts - _SHINGLE_WORDS + 1, 0)
    position = np.arange(len(words)) - np.repeat(words_until - counts, counts)
    kept = (hashes >> np.uint64(32)).astype(np.uint32)[position < np.repeat(shingles, counts)]
    return _with_short_texts(kept, shingles, texts)


def _with_short_texts(hashes: np.ndarray, counts: np.ndarray, texts: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
    """Give texts of fewer than five words one hash of all their words."""
    short = np.flatnonzero(counts == 0)
    if len(short):
        whole = [xxhash.xxh32_intdigest(b" ".join(texts[index].split())) for index in short.tolist()]
        hashes = np.insert(hashes, np.cumsum(counts)[short], np.array(whole, dtype=np.uint32))
        counts = counts.copy()
        counts[short] = 1
    return hashes, np.cumsum(counts)


def _words(joined: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Hash and end of every word; a word is a run without white space, or one character of three bytes and more."""
    is_space = _SPACE[joined]
    is_inner = (joined >= _CONTINUATION[0]) & (joined < _CONTINUATION[1])
    begins = ~is_space
    begins[1:] &= is_space[:-1]
    is_long = joined >= _FIRST_LONG_LEAD
    if is_long.any():
        lead = np.maximum.accumulate(np.where(is_inner, 0, np.arange(len(joined))))
        begins |= is_long
        begins[1:] |= is_long[lead[:-1]] & ~is_inner[1:] & ~is_space[1:]
    starts, spaces = np.flatnonzero(begins), np.flatnonzero(is_space)
    ends = np.minimum(np.append(starts[1:], len(joined)), spaces[np.searchsorted(spaces, starts)])
    # Polynomial hash of joined[start:end] from prefix sums; dividing by the power makes it independent of the place.
    powers = np.cumprod(np.full(len(joined), _MULTIPLIER))
    sums = np.concatenate([[np.uint64(0)], np.cumsum((joined + np.uint64(1)) * powers)])
    inverses = np.cumprod(np.full(len(joined), _INVERSE))
    return hash_positions(0, (sums[ends] - sums[starts]) * inverses[starts]), ends
