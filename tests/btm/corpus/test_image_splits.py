import numpy as np
import pytest

from btm.corpus.dedup import DocumentSet, Fate, decide_fates
from btm.corpus.images.marks import mark
from btm.corpus.images.splits import drop_shared_pictures, load_shown, save_shown, shown_pictures, split_keys
from btm.errors import DataError

FRACTIONS = {"dev_fraction": 0.1, "test_fraction": 0.1}


def full_hash(value):
    return f"{value:016x}{0:016x}"


def shown_of(*documents):
    """Pairs of documents given as lists of picture numbers."""
    return np.array(
        [(number, picture) for number, pictures in enumerate(documents) for picture in pictures], dtype=np.uint64
    ).reshape(-1, 2)


def drop(fates, shown, *others):
    return drop_shared_pictures(np.array(fates, dtype=np.uint8), shown, others).tolist()


def test_pairs_and_hashes_of_texts():
    one, two = full_hash(3), full_hash(2**64 - 1)
    shown, hashes = shown_pictures([(0, mark(two) + "x" + mark(one)), (4, "text"), (5, mark(one))])
    assert shown.tolist() == [[0, 2**64 - 1], [0, 3], [5, 3]]
    assert list(hashes) == [two, one]
    assert shown_pictures([])[0].shape == (0, 2)


def test_all_documents_of_a_picture_are_in_one_split():
    generator = np.random.default_rng(0)
    pictures = generator.integers(0, 2**64, size=300, dtype=np.uint64)
    texts = generator.integers(0, 2**64, size=3000, dtype=np.uint64)
    shown = np.stack([np.arange(3000, dtype=np.uint64), pictures.repeat(10)], axis=1)
    documents = DocumentSet("d", texts, np.zeros((0, 128), np.uint8), split_keys=split_keys(texts, shown))
    fates = decide_fates(documents, [], near_duplicate_threshold=1, **FRACTIONS).fates.reshape(300, 10)
    assert (fates == fates[:, :1]).all()
    shares = np.bincount(fates[:, 0], minlength=3) / 300
    assert 0.7 < shares[0] < 0.9
    assert shares[1] > 0.03
    assert shares[2] > 0.03
    by_text = decide_fates(
        DocumentSet("d", texts, documents.signatures), [], near_duplicate_threshold=1, **FRACTIONS
    ).fates.reshape(300, 10)
    assert not (by_text == by_text[:, :1]).all()


def test_the_first_picture_decides_and_text_where_there_is_none():
    texts = np.array([10, 11, 12], dtype=np.uint64)
    assert split_keys(texts, shown_of([7, 8], [], [9])).tolist() == [7, 11, 9]


def test_held_out_documents_with_a_training_picture_are_dropped():
    fates = [Fate.train, Fate.dev, Fate.test, Fate.test, Fate.dev]
    assert drop(fates, shown_of([1, 2], [3, 2], [4], [], [1, 1])) == [0, Fate.near_duplicate, 2, 2, 4]


def test_dropped_documents_count_for_nothing():
    fates = [Fate.exact_duplicate, Fate.dev]
    assert drop(fates, shown_of([1], [1])) == fates


def test_the_later_domain_gives_way():
    earlier = (np.array([Fate.train, Fate.test, Fate.near_duplicate], dtype=np.uint8), shown_of([1], [2], [3]))
    fates = [Fate.dev, Fate.train, Fate.test, Fate.train, Fate.test]
    assert drop(fates, shown_of([1], [2], [2], [3], [5]), earlier) == [4, 4, 2, 0, 2]
    # A training document that was dropped for another domain's sake holds nothing back.
    assert drop([Fate.train, Fate.test], shown_of([2, 6], [6]), earlier) == [4, 2]


def test_no_picture_is_on_both_sides():
    generator = np.random.default_rng(1)
    shown = shown_of(*(generator.integers(0, 200, size=generator.integers(0, 4)) for _ in range(400)))
    other = shown_of(*(generator.integers(0, 200, size=2) for _ in range(20)))
    others = generator.integers(0, 3, size=20).astype(np.uint8)
    fates = generator.integers(0, 3, size=400).astype(np.uint8)
    found = drop_shared_pictures(fates, shown, [(others, other)])
    everything = [(number, int(picture), found) for number, picture in shown.tolist()]
    everything += [(number, int(picture), others) for number, picture in other.tolist()]
    train = {picture for number, picture, of in everything if of[number] == Fate.train}
    held_out = {picture for number, picture, of in everything if of[number] in (Fate.dev, Fate.test)}
    # Among the earlier domain's own documents nothing is changed.
    own = {picture for number, picture in other.tolist() if others[number] == 0}
    own &= {picture for number, picture in other.tolist() if others[number] in (1, 2)}
    assert train & held_out <= own
    assert set(fates[found != fates].tolist()) == {0, 1, 2}


def test_kept_on_disk(tmp_path):
    shown = shown_of([1, 2**63], [3])
    save_shown(shown, tmp_path)
    np.testing.assert_array_equal(load_shown(tmp_path), shown)
    assert load_shown(tmp_path / "text").shape == (0, 2)
    (tmp_path / "pictures.npy").write_bytes(b"broken")
    with pytest.raises(DataError, match="cannot be read"):
        load_shown(tmp_path)
    np.save(tmp_path / "pictures.npy", np.zeros(3))
    with pytest.raises(DataError, match="float64"):
        load_shown(tmp_path)
