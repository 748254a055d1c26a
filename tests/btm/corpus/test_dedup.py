import random

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from btm.corpus import dedup
from btm.corpus.dedup import DocumentSet, Fate, decide_fates, near_copies, repeated, split_of
from btm.corpus.shingles import signatures
from btm.corpus.survey import text_hash

FRACTIONS = {"dev_fraction": 0.1, "test_fraction": 0.1}


def document_set(domain, texts):
    data = [text.encode() for text in texts]
    return DocumentSet(domain, np.array([text_hash(text) for text in data], dtype=np.uint64), signatures(data))


def decide(documents, earlier=(), threshold=0.8):
    return decide_fates(documents, earlier, near_duplicate_threshold=threshold, **FRACTIONS)


def prose(seed, count=300):
    rng = random.Random(seed)
    return " ".join(f"w{rng.randrange(10_000)}" for _ in range(count))


def text_with_fate(fate, seed=0):
    """A text that the split rule sends to ``fate``."""
    while True:
        text = prose(seed)
        if split_of(document_set("x", [text]).hashes, **FRACTIONS)[0] == fate:
            return text
        seed += 1000


@settings(max_examples=30, deadline=None)
@given(st.lists(st.text(min_size=1), max_size=60, unique=True), st.randoms())
def test_splits_are_stable(texts, rng):
    """B3: a document's split depends on its text alone, not on order or on other documents."""
    hashes = np.array([text_hash(text.encode("utf-8", "surrogatepass")) for text in texts], dtype=np.uint64)
    whole = split_of(hashes, **FRACTIONS)
    order = list(range(len(texts)))
    rng.shuffle(order)
    part = order[: len(order) // 2 + 1]
    assert split_of(hashes[part], **FRACTIONS).tolist() == whole[part].tolist()


def test_split_shares():
    hashes = np.array([text_hash(str(number).encode()) for number in range(20_000)], dtype=np.uint64)
    counts = np.bincount(split_of(hashes, dev_fraction=0.05, test_fraction=0.1), minlength=3) / len(hashes)
    assert np.allclose(counts, [0.85, 0.05, 0.1], atol=0.01)


def test_exact_duplicates_keep_the_first():
    assert repeated(np.array([5, 7, 5, 5, 7, 1], dtype=np.uint64)).tolist() == [False, False, True, True, True, False]
    texts = [prose(1), prose(2), prose(1), prose(2), prose(3)]
    fates = decide(document_set("law", texts)).fates
    assert (fates == Fate.exact_duplicate).tolist() == [False, False, True, True, False]


def test_held_out_copies_of_training_documents_are_dropped():
    for held_out in (Fate.dev, Fate.test):
        text = text_with_fate(held_out)
        seed = 0
        while True:
            words = text.split()
            words[seed % len(words)] = f"changed{seed}"
            copy = " ".join(words)
            if split_of(document_set("x", [copy]).hashes, **FRACTIONS)[0] == Fate.train:
                break
            seed += 1
        other = text_with_fate(held_out, seed=7)
        fates = decide(document_set("law", [text, copy, other])).fates
        assert fates.tolist() == [Fate.near_duplicate, Fate.train, held_out]
        assert decide(document_set("law", [text, copy, other]), threshold=1).fates[0] == held_out


def test_the_later_domain_gives_way():
    """Shared text is dropped from the later domain, so that an earlier one never changes."""
    held_out, training = text_with_fate(Fate.test), text_with_fate(Fate.train)
    shared, own = prose(50), prose(51)
    first = document_set("law", [held_out, training, shared])
    decided = DocumentSet(first.domain, first.hashes, first.signatures, decide(first).fates)
    decision = decide(document_set("med", [shared, held_out + " end", "start " + training, own]), [decided])
    assert decision.shared == {"law": 1}
    assert decision.fates[0] == Fate.exact_duplicate
    expected_train_copy = split_of(document_set("x", [held_out + " end"]).hashes, **FRACTIONS)[0]
    assert decision.fates[1] == (Fate.near_duplicate if expected_train_copy == Fate.train else expected_train_copy)
    expected_held_out = split_of(document_set("x", ["start " + training]).hashes, **FRACTIONS)[0]
    assert decision.fates[2] == (Fate.train if expected_held_out == Fate.train else Fate.near_duplicate)
    assert decision.fates[3] <= Fate.test


def test_near_copies_finds_what_comparing_all_pairs_finds():
    texts = [prose(seed, 200) for seed in range(40)]
    changed = []
    for seed, text in enumerate(texts):
        words = text.split()
        for place in range(0, 200, 4 + 6 * seed):
            words[place] = "x"
        changed.append(" ".join(words))
    queries = signatures([text.encode() for text in changed])
    references = signatures([text.encode() for text in texts])
    rows = np.arange(len(references))
    agreement = (queries[:, None] == references).mean(axis=2)
    expected = ((agreement - 1 / 256) / (1 - 1 / 256) >= 0.7).any(axis=1)
    found = near_copies(queries, references, rows, 0.7)
    assert found.tolist() == expected.tolist()
    assert 5 < found.sum() < 40
    assert not near_copies(queries, references, rows[:0], 0.7).any()


def test_repetitive_text_costs_no_quadratic_time(monkeypatch):
    """All references share every band with every query: 64 of them are compared, not 50,000."""
    compared = 0

    def counted(*arguments):
        nonlocal compared
        for query, reference in pairs(*arguments):
            compared += len(query)
            yield query, reference

    pairs = dedup._pairs
    monkeypatch.setattr(dedup, "_pairs", counted)
    same = np.repeat(signatures([prose(1).encode()]), 50_000, axis=0)
    half = same.copy()
    half[:, 64:] = np.random.default_rng(0).integers(0, 256, (50_000, 64))
    assert not near_copies(half[:200], same, np.arange(50_000), 0.8).any()
    assert 200 * 64 * 16 <= compared <= 200 * 64 * 32
    compared = 0
    assert near_copies(same[:200], same, np.arange(50_000), 0.8).all()
    assert compared == 200 * 64
