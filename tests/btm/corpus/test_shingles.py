import random

import numpy as np
import pytest

from btm.corpus.shingles import NUM_HASHES, signatures


def shingles(text):
    words = text.split()
    return {tuple(words[start : start + 5]) for start in range(max(1, len(words) - 4))}


@pytest.mark.parametrize("changed", [0.0, 0.005, 0.02, 0.1, 1.0])
def test_agreement_estimates_the_jaccard_similarity(changed):
    rng = random.Random(0)
    errors = []
    for _ in range(10):
        words = [f"w{rng.randrange(5000)}" for _ in range(1500)]
        other = [word if rng.random() >= changed else "x" + word for word in words]
        a, b = " ".join(words), "\n ".join(other)
        expected = len(shingles(a) & shingles(b)) / len(shingles(a) | shingles(b))
        found = signatures([a.encode(), b.encode()])
        errors.append((found[0] == found[1]).mean() - expected)
    assert abs(np.mean(errors)) < 0.04
    assert np.abs(errors).max() < 0.15


def test_a_signature_depends_on_its_text_alone():
    rng = random.Random(1)
    texts = [" ".join(f"w{rng.randrange(99)}" for _ in range(rng.randrange(1, 3000))).encode() for _ in range(60)]
    texts += ["\u65e5\u672c\u8a9e\u306e\u6587\u7ae0\u3067\u3059".encode(), b"one", b" five words are here now "]
    together = signatures(texts)
    assert together.shape == (len(texts), NUM_HASHES)
    assert np.array_equal(together, np.concatenate([signatures([text]) for text in texts]))
    assert np.array_equal(together[::-1], signatures(texts[::-1]))


def test_short_texts_and_scripts_without_spaces():
    base = "\u65e5\u672c\u8a9e\u306e\u6587\u7ae0\u306b\u306f\u7a7a\u767d\u304c\u306a\u3044" * 4
    found = signatures([base.encode(), (base + "\u8ffd\u52a0").encode(), b"a b", b" a\n b ", b"a c", b"quite another"])
    assert (found[0] == found[1]).mean() > 0.7
    assert np.array_equal(found[2], found[3])
    assert (found[2] == found[4]).mean() < 0.1
    assert (found[4] == found[5]).mean() < 0.1


def test_no_texts():
    assert signatures([]).shape == (0, NUM_HASHES)
