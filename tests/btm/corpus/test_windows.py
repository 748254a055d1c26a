import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from btm.corpus.shards import ShardWriter, TokenShard
from btm.corpus.windows import document_windows

EOS = 7


def shard_of(path, lengths):
    rng = np.random.default_rng(0)
    with ShardWriter(path / "dev", 1000) as writer:
        for length in lengths:
            writer.add(np.append(rng.integers(10, 1000, length - 1), EOS), length)
    return TokenShard(path / "dev")


@settings(max_examples=40, deadline=None)
@given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=12), length=st.integers(1, 16))
def test_every_token_is_a_target_once(tmp_path_factory, lengths, length):
    shard = shard_of(tmp_path_factory.mktemp("w"), lengths)
    windows = document_windows(shard, sequence_length=length, eos_id=EOS)
    counted = windows.targets != -100
    assert windows.targets[counted].tolist() == shard.tokens.tolist() == windows.token_ids.tolist()
    assert counted.sum(1).tolist() == windows.lengths.tolist()
    assert np.bincount(windows.document, windows.lengths).tolist() == lengths
    assert np.diff(windows.document_starts).tolist() == lengths
    assert windows.document_bytes.tolist() == lengths
    for index in range(shard.num_documents):
        rows = windows.document == index
        assert windows.inputs[rows][counted[rows]].tolist() == [EOS, *shard.document(index)[:-1].tolist()]
    assert (windows.inputs[~counted] == EOS).all()


def test_limits_take_whole_documents(tmp_path):
    shard = shard_of(tmp_path, [4, 4, 4])

    def taken(**limits):
        return len(document_windows(shard, sequence_length=8, eos_id=EOS, **limits).document_starts) - 1

    assert [taken(max_tokens=count) for count in (1, 4, 5, 8, 9, 99)] == [1, 1, 2, 2, 3, 3]
    assert [taken(max_documents=count) for count in (1, 2, 9)] == [1, 2, 3]
    assert taken(max_tokens=9, max_documents=2) == 2


def test_no_documents(tmp_path):
    windows = document_windows(shard_of(tmp_path, []), sequence_length=8, eos_id=EOS)
    assert windows.inputs.shape == (0, 8)
    assert windows.document_starts.tolist() == [0]
