import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from btm.config_train import Packing
from btm.corpus.mixture import MixtureSchedule, cycle_counts
from btm.corpus.randomness import permutation
from btm.corpus.sampler import BatchSampler, open_source, part_documents
from btm.corpus.shards import ShardWriter
from btm.errors import DataError
from btm.requests import Part, TokenSource

EOS = 0


def source(path, name, lengths, *, first_token=1, weight=1.0, part=None):
    """A shard whose tokens are all different, so that each can be followed."""
    token = first_token
    with ShardWriter(path / name, 10_000_000) as writer:
        for length in lengths:
            writer.add(np.append(np.arange(token, token + length - 1), EOS), length)
            token += length - 1
    return TokenSource(domain=name, prefix=str(path / name), weight=weight, part=part)


def sampler(sources, **changes):
    given = {"sequence_length": 8, "batch_sequences": 4, "packing": Packing.blocks, "seed": 3, "eos_id": EOS}
    return BatchSampler(sources, **(given | changes))


def targets(batch):
    found = batch.targets
    return found[found != -100]


@settings(max_examples=30, deadline=None)
@given(
    lengths=st.lists(st.integers(2, 30), min_size=1, max_size=12),
    length=st.integers(1, 12),
    packing=st.sampled_from(list(Packing)),
    seed=st.integers(0, 2**31 - 1),
)
def test_each_document_once_per_epoch(tmp_path_factory, lengths, length, packing, seed):
    """B3: an epoch holds every token of every document as a target exactly once, in the document's order."""
    made = sampler(
        [source(tmp_path_factory.mktemp("s"), "law", lengths)],
        sequence_length=length,
        batch_sequences=1,
        packing=packing,
        seed=seed,
    )
    total = sum(lengths)
    drawn, update = [], 0
    while len(drawn) < 2 * total:
        drawn += targets(made.batch(update)).tolist()
        update += 1
    expected = sorted([EOS] * len(lengths) + list(range(1, total - len(lengths) + 1)))
    for epoch in range(2):
        assert sorted(drawn[epoch * total : (epoch + 1) * total]) == expected


def test_blocks_are_the_stream_of_documents(tmp_path):
    made = sampler([source(tmp_path, "law", [4, 3, 6])], sequence_length=5, batch_sequences=2)
    rows = np.concatenate([made.batch(update).tokens for update in range(6)])
    assert rows[0, 0] == EOS
    assert (rows[1:, 0] == rows[:-1, -1]).all(), "each row begins with the last target of the row before"
    stream = rows[:, 1:].ravel().tolist()
    documents = {tuple(d) for d in ([1, 2, 3, 0], [4, 5, 0], [6, 7, 8, 9, 10, 0])}
    for epoch in range(4):
        part = stream[13 * epoch : 13 * (epoch + 1)]
        ends = [index + 1 for index, token in enumerate(part) if token == EOS]
        assert {tuple(part[a:b]) for a, b in zip([0, *ends[:-1]], ends, strict=True)} == documents
    assert len({tuple(stream[13 * epoch : 13 * (epoch + 1)]) for epoch in range(4)}) > 1, "epochs differ in order"


def test_documents_are_whole_where_they_fit(tmp_path):
    lengths = [3, 9, 2, 5, 4, 20, 7, 8]
    made = sampler([source(tmp_path, "law", lengths)], packing="documents", batch_sequences=1, sequence_length=8)
    pieces, total = [], 0
    update = 0
    while total < sum(lengths):
        batch = made.batch(update)
        tokens, segments = batch.tokens[0], batch.segments[0]
        for number in range(1, segments.max() + 1):
            place = np.flatnonzero(segments == number)
            assert (np.diff(place) == 1).all()
            pieces.append(tokens[place].tolist())
        kept = batch.targets[0] != -100
        assert kept.sum() == batch.domain_tokens["law"] == (segments > 0).sum() - segments.max()
        total += kept.sum()
        update += 1
    assert total == sum(lengths)
    short = [piece for piece in pieces if piece[0] == EOS and piece[-1] == EOS and len(piece) - 1 <= 8]
    assert sorted(len(piece) - 1 for piece in short) == sorted(size for size in lengths if size <= 8)
    assert update <= -(-sum(size + 1 for size in lengths) // 9) + 2, "rows are well filled"


@pytest.mark.parametrize("packing", list(Packing))
def test_a_batch_is_a_function_of_seed_and_update(tmp_path, packing):
    """R6, B2: order of calls, restarts and other samplers change nothing; another seed does."""
    sources = [source(tmp_path, "law", [5] * 40), source(tmp_path, "med", [9] * 30, first_token=1000, weight=3)]
    first = sampler(sources, packing=packing)
    forward = [first.batch(update) for update in range(12)]
    again = sampler(sources, packing=packing)
    for update in (11, 0, 5, 11, 3):
        batch = again.batch(update)
        assert np.array_equal(batch.tokens, forward[update].tokens)
        assert np.array_equal(batch.targets, forward[update].targets)
        assert batch.domain_tokens == forward[update].domain_tokens
    assert not np.array_equal(sampler(sources, packing=packing, seed=4).batch(0).tokens, forward[0].tokens)


@pytest.mark.parametrize("packing", list(Packing))
@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_world_size_changes_nothing(tmp_path, packing, world):
    """R6: the ranks of any world size together hold exactly the batch."""
    made = sampler([source(tmp_path, "law", [5, 6, 7] * 9)], packing=packing)
    batch = made.batch(2)
    shares = [BatchSampler.rows(batch, rank, world) for rank in range(world)]
    assert np.array_equal(np.concatenate([share.tokens for share in shares]), batch.tokens)
    assert np.array_equal(np.concatenate([share.targets for share in shares]), batch.targets)
    assert all(share.domain_tokens == batch.domain_tokens for share in shares)


def test_order_of_a_domain_does_not_depend_on_the_others(tmp_path):
    law = source(tmp_path, "law", [5] * 40)
    med = source(tmp_path, "med", [5] * 40, first_token=1000)
    alone = np.concatenate([sampler([law]).batch(update).tokens for update in range(4)])
    both = np.concatenate([sampler([med, law]).batch(update).tokens for update in range(8)])
    assert np.array_equal(both[both.max(1) < 1000], alone)


@settings(max_examples=60, deadline=None)
@given(
    weights=st.lists(st.floats(0.01, 10), min_size=1, max_size=7),
    first=st.integers(0, 10**9),
    count=st.integers(1, 400),
)
def test_realised_counts_follow_the_weights(weights, first, count):
    """After any number of sequences each source is within one sequence of its share of the cycle."""
    schedule = MixtureSchedule(weights)
    counts = cycle_counts(weights)
    period = sum(counts)
    drawn, rank = schedule.draw(first, count)
    for index, in_cycle in enumerate(counts):
        assert in_cycle / period == pytest.approx(weights[index] / sum(weights), abs=len(weights) / 65536)
        mine = rank[drawn == index]
        assert (np.diff(mine) == 1).all(), "no row of a source is left out or drawn twice"
        if len(mine):
            place = first + np.flatnonzero(drawn == index)[0]
            assert abs(int(mine[0]) - place * in_cycle / period) <= 1
        assert abs(len(mine) - count * in_cycle / period) <= 2


def test_simple_weights_are_exact():
    assert cycle_counts([1, 1, 1]) == [1, 1, 1]
    assert cycle_counts([0.5, 0.3, 0.2]) == [5, 3, 2]
    drawn, _ = MixtureSchedule([0.5, 0.3, 0.2]).draw(0, 1000)
    assert np.bincount(drawn).tolist() == [500, 300, 200]


def test_realised_tokens_are_reported(tmp_path):
    sources = [
        source(tmp_path, "law", [9] * 20, weight=3),
        source(tmp_path, "med", [9] * 20, first_token=1000),
        source(tmp_path, "bio", [9] * 20, weight=0),
    ]
    assert sampler(sources).batch(0).domain_tokens == {"law": 24, "med": 8}


@settings(max_examples=30, deadline=None)
@given(count=st.integers(1, 9), documents=st.integers(0, 300))
def test_parts_are_a_partition(count, documents):
    """B3: the random splits of a domain are disjoint and cover it."""
    parts = [part_documents(documents, "law", Part(index=index, count=count)) for index in range(count)]
    assert sorted(np.concatenate(parts).tolist()) == list(range(documents))


def test_parts_have_similar_sizes_and_differ_between_domains():
    sizes = [len(part_documents(8000, "law", Part(index=index, count=8))) for index in range(8)]
    assert min(sizes) > 800
    assert max(sizes) < 1200
    law, med = (part_documents(8000, domain, Part(index=0, count=2)) for domain in ("law", "med"))
    assert 1600 < len(np.intersect1d(law, med)) < 2400


def test_short_data_wraps_around(tmp_path):
    made = sampler([source(tmp_path, "law", [2])], sequence_length=8)
    assert set(made.batch(1000).tokens.ravel().tolist()) == {0, 1}


def test_faults_are_named(tmp_path):
    law = source(tmp_path, "law", [5])
    with pytest.raises(DataError, match="weight above 0"):
        sampler([law.model_copy(update={"weight": 0.0})])
    with pytest.raises(DataError, match="has no documents"):
        sampler([source(tmp_path, "void", [])])
    parts = [law.model_copy(update={"part": Part(index=index, count=2)}) for index in range(3)]
    with pytest.raises(DataError, match="part 2 of 2"):
        open_source(parts[2])
    with pytest.raises(DataError, match="has no documents in part"):
        [open_source(part) for part in parts[:2]]


@pytest.mark.parametrize("packing", list(Packing))
def test_the_order_of_an_epoch_is_drawn_once(tmp_path, monkeypatch, packing):
    """Drawing costs what the batch is large, not what the corpus is."""
    orders = []

    def counted(key, count):
        orders.append(key)
        return permutation(key, count)

    monkeypatch.setattr("btm.corpus.packing.permutation", counted)
    lengths = np.random.default_rng(0).integers(20, 200, 100)
    made = sampler([source(tmp_path, "law", lengths)], sequence_length=64, batch_sequences=8, packing=packing)
    packings, drawn, update = len(orders), 0, 0
    while drawn < 2.5 * lengths.sum():
        drawn += sum(made.batch(update).domain_tokens.values())
        update += 1
    assert update > 40
    assert len(orders) - packings == len(set(orders[packings:])) == 3
