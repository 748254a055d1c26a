import os
import struct
import sys

import numpy as np
import pytest

from btm.corpus.shards import MAGIC, ShardWriter, TokenShard, token_dtype
from btm.errors import DataError


def write(prefix, documents, vocab_size=1000):
    with ShardWriter(prefix, vocab_size) as writer:
        for ids in documents:
            writer.add(np.array(ids), 3 * len(ids))
    return TokenShard(prefix)


@pytest.mark.parametrize(("vocab_size", "dtype"), [(1000, np.uint16), (65_499, np.uint16), (65_500, np.int32)])
def test_documents_come_back(tmp_path, vocab_size, dtype):
    documents = [[5, 6, vocab_size - 1], [0], list(range(100))]
    shard = write(tmp_path / "a b" / "train", documents, vocab_size)
    assert shard.tokens.dtype == dtype == token_dtype(vocab_size)
    assert [shard.document(index).tolist() for index in range(3)] == documents
    assert [shard.document_bytes(index) for index in range(3)] == [9, 3, 300]
    assert shard.num_documents == 3
    assert shard.num_tokens == 104
    assert shard.lengths.tolist() == [3, 1, 100]


def test_index_has_the_published_layout(tmp_path):
    write(tmp_path / "train", [[1, 2], [3]])
    expected = MAGIC + struct.pack("<QBQQ", 1, 8, 2, 3) + struct.pack("<2i2q3q", 2, 1, 0, 4, 0, 1, 2)
    assert (tmp_path / "train.idx").read_bytes() == expected
    assert (tmp_path / "train.bin").read_bytes() == struct.pack("<3H", 1, 2, 3)


def test_megatron_reads_the_shard(tmp_path, monkeypatch):
    if "MEGATRON_DIR" in os.environ:
        monkeypatch.setattr(sys, "path", [*sys.path, os.environ["MEGATRON_DIR"]])
    megatron = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    documents = [[1, 2, 3], [4], [5, 6]]
    write(tmp_path / "train", documents)
    dataset = megatron.IndexedDataset(str(tmp_path / "train"))
    assert [dataset[index].tolist() for index in range(len(dataset))] == documents
    assert dataset.document_indices.tolist() == [0, 1, 2, 3]


def test_sequences_of_one_document_are_joined(tmp_path):
    np.array([1, 2, 3, 4, 5, 6], dtype="<i4").tofile(tmp_path / "other.bin")
    index = MAGIC + struct.pack("<QBQQ", 1, 4, 3, 3)
    index += struct.pack("<3i3q3q", 2, 3, 1, 0, 8, 20, 0, 2, 3)
    (tmp_path / "other.idx").write_bytes(index)
    shard = TokenShard(tmp_path / "other")
    assert [shard.document(index).tolist() for index in range(2)] == [[1, 2, 3, 4, 5], [6]]


def test_failed_writing_leaves_nothing(tmp_path):
    with pytest.raises(DataError, match="outside the vocabulary of 1000"):
        write(tmp_path / "train", [[1], [1000]])
    with pytest.raises(DataError, match="0 tokens"):
        write(tmp_path / "train", [[]])
    assert list(tmp_path.iterdir()) == []


def test_empty_shard(tmp_path):
    shard = write(tmp_path / "train", [])
    assert (shard.num_documents, shard.num_tokens, len(shard.bytes)) == (0, 0, 0)


def _cut(path, count):
    path.write_bytes(path.read_bytes()[:count])


def _poke(path, offset, value):
    data = bytearray(path.read_bytes())
    data[offset] = value
    path.write_bytes(data)


DAMAGES = {
    "missing bin": (lambda d: (d / "t.bin").unlink(), "is missing"),
    "missing index": (lambda d: (d / "t.idx").unlink(), "is missing"),
    "empty index": (lambda d: _cut(d / "t.idx", 0), "not an index"),
    "wrong magic": (lambda d: _poke(d / "t.idx", 0, 0), "not an index"),
    "newer version": (lambda d: _poke(d / "t.idx", 9, 2), "has version 2"),
    "unknown type": (lambda d: _poke(d / "t.idx", 17, 6), "type code 6"),
    "cut index": (lambda d: _cut(d / "t.idx", 60), "does not fit its header"),
    "absurd count": (lambda d: _poke(d / "t.idx", 25, 255), "does not fit its header"),
    "wrong pointer": (lambda d: _poke(d / "t.idx", 34 + 8 + 8, 9), "one after the other"),
    "wrong border": (lambda d: _poke(d / "t.idx", 34 + 8 + 16 + 8, 7), "document borders"),
    "cut bin": (lambda d: _cut(d / "t.bin", 4), "its index says 3"),
    "odd bin": (lambda d: _cut(d / "t.bin", 5), "not a multiple of 2"),
    "pickled sizes": (lambda d: np.save(d / "t.bytes.npy", np.array([{}, {}]), allow_pickle=True), "cannot be read"),
    "cut sizes": (lambda d: _cut(d / "t.bytes.npy", 20), "cannot be read"),
    "other sizes": (lambda d: np.save(d / "t.bytes.npy", np.zeros(5, np.int64)), "does not fit"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_named(tmp_path, name):
    damage, message = DAMAGES[name]
    write(tmp_path / "t", [[1, 2], [3]])
    damage(tmp_path)
    with pytest.raises(DataError, match=message) as caught:
        _ = TokenShard(tmp_path / "t").bytes
    assert str(tmp_path) in str(caught.value)
