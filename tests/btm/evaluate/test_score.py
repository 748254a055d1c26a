"""Scores: every token once, equal to a plain forward pass, kept while they answer the same request."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from btm.corpus.shards import ShardWriter, TokenShard
from btm.errors import DataError, ForestError
from btm.evaluate import score as score_module
from btm.evaluate.score import Scores, load_scores, main, save_scores, score
from btm.model.causal_lm import load_model, save_model
from btm.records import StepResult
from btm.requests import ScoreSource, ScoreSpec

EOS = 0
LENGTHS = (5, 40, 16, 1, 33, 7)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("score")
    generator = np.random.default_rng(0)
    with ShardWriter(folder / "test", 60) as writer:
        for length in LENGTHS:
            writer.add(np.append(generator.integers(1, 60, length - 1), EOS), num_bytes=3 * length)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=60, eos_token_id=EOS, bos_token_id=EOS, **sizes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(8)
    save_model(model, folder / "model", torch.float32)
    return folder


def request(folder: Path, output: Path, **changes) -> ScoreSpec:
    source = {"key": "test-law", "prefix": str(folder / "test"), "fingerprint": "f"}
    other = {"key": "dev-law", "prefix": str(folder / "test"), "fingerprint": "f", "max_documents": 2}
    values = {
        "name": "elm/law",
        "model_dir": str(folder / "model"),
        "model_sha256": "m",
        "sources": [source, other],
        "output_dir": str(output),
        "sequence_length": 16,
        "batch_sequences": 3,
        "dtype": "fp32",
    }
    return ScoreSpec.model_validate(values | changes)


def plain(folder: Path, sequence_length: int) -> list[np.ndarray]:
    """Each document by itself, window by window: no batches, no padding."""
    model, shard, documents = load_model(folder / "model"), TokenShard(folder / "test"), []
    for index in range(shard.num_documents):
        ids = torch.tensor([EOS, *shard.document(index).tolist()])
        parts = []
        for start in range(0, len(ids) - 1, sequence_length):
            window = ids[start : start + sequence_length + 1]
            with torch.no_grad():
                logp = torch.log_softmax(model(window[None, :-1]).logits[0], -1)
            parts.append(logp.gather(-1, window[1:, None])[:, 0])
        documents.append(torch.cat(parts).numpy())
    return documents


def test_scores_are_those_of_a_plain_forward_pass(folder, tmp_path) -> None:
    spec = request(folder, tmp_path)
    score(spec)
    scores = load_scores(tmp_path, "test-law")
    assert scores.logp.dtype == np.float32
    assert np.diff(scores.document_starts).tolist() == list(LENGTHS)
    assert scores.document_bytes.tolist() == [3 * length for length in LENGTHS]
    for index, expected in enumerate(plain(folder, 16)):
        assert np.allclose(scores.document(index), expected, atol=1e-4)
    assert load_scores(tmp_path, "dev-law").num_documents == 2
    assert StepResult.load(tmp_path / "result.json").spec_sha256 == spec.sha256


def test_the_same_request_gives_the_same_bits(folder, tmp_path) -> None:
    for name in ("a", "b"):
        score(request(folder, tmp_path / name, dtype="bf16"))
    assert (tmp_path / "a/test-law.npz").read_bytes() == (tmp_path / "b/test-law.npz").read_bytes()


def test_batches_do_not_change_the_numbers(folder, tmp_path) -> None:
    for size in (1, 16):
        score(request(folder, tmp_path / str(size), batch_sequences=size))
    one, many = (load_scores(tmp_path / str(size), "test-law").logp for size in (1, 16))
    assert np.allclose(one, many, atol=1e-5)


def count_loads(monkeypatch) -> list[str]:
    loads, load = [], score_module._load
    monkeypatch.setattr(score_module, "_load", lambda spec: loads.append(spec.name) or load(spec))
    return loads


def test_finished_scores_are_kept_and_stale_ones_are_not(folder, tmp_path, monkeypatch) -> None:
    score(request(folder, tmp_path))
    loads = count_loads(monkeypatch)
    before = (tmp_path / "test-law.npz").stat().st_mtime_ns
    score(request(folder, tmp_path))
    assert loads == []
    for change in ({"model_sha256": "other"}, {"sequence_length": 8}, {"dtype": "bf16"}):
        loads.clear()
        score(request(folder, tmp_path, **change))
        assert len(loads) == 1
    assert (tmp_path / "test-law.npz").stat().st_mtime_ns != before


def test_a_new_domain_leaves_the_scores_of_the_others(folder, tmp_path) -> None:
    spec = request(folder, tmp_path)
    score(spec)
    before = (tmp_path / "test-law.npz").stat().st_mtime_ns
    more = [*spec.model_dump()["sources"], {"key": "test-new", "prefix": str(folder / "test"), "fingerprint": "g"}]
    score(request(folder, tmp_path, sources=more))
    assert (tmp_path / "test-law.npz").stat().st_mtime_ns == before
    assert load_scores(tmp_path, "test-new").num_documents == len(LENGTHS)


@pytest.mark.parametrize("damage", [b"", b"PK", b"not an archive at all"])
def test_damaged_scores_are_named_and_made_again(folder, tmp_path, damage) -> None:
    score(request(folder, tmp_path))
    path = tmp_path / "test-law.npz"
    whole = path.read_bytes()
    path.write_bytes(damage)
    with pytest.raises(ForestError, match="damaged"):
        load_scores(tmp_path, "test-law")
    score(request(folder, tmp_path))
    assert path.read_bytes() == whole


def test_every_flipped_byte_of_the_numbers_is_noticed(folder, tmp_path) -> None:
    score(request(folder, tmp_path))
    path = tmp_path / "test-law.npz"
    whole = path.read_bytes()
    expected = load_scores(tmp_path, "test-law")
    for position in np.random.default_rng(0).integers(0, len(whole), 60).tolist():
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 16]) + whole[position + 1 :])
        try:
            scores = load_scores(tmp_path, "test-law")
        except ForestError:
            continue
        assert all(np.array_equal(left, right) for left, right in zip(scores, expected, strict=True))


def test_pickles_are_refused(tmp_path) -> None:
    np.savez(tmp_path / "evil.npz", logp=np.array([object()]), allow_pickle=True)
    with pytest.raises(ForestError, match="damaged"):
        load_scores(tmp_path, "evil")


def test_missing_scores_and_disagreeing_arrays_are_named(tmp_path) -> None:
    with pytest.raises(ForestError, match="does not exist"):
        load_scores(tmp_path, "test-law")
    save_scores(tmp_path / "odd.npz", Scores(np.zeros(3, np.float32), np.array([0, 2]), np.array([9])), "r")
    with pytest.raises(ForestError, match="disagree"):
        load_scores(tmp_path, "odd")


def test_what_cannot_be_measured_is_named(folder, tmp_path) -> None:
    nan = np.array([-1.0, np.nan], np.float32)
    save_scores(tmp_path / "nan.npz", Scores(nan, np.array([0, 2]), np.array([9])), "r")
    with pytest.raises(ForestError, match="holds NaN"):
        load_scores(tmp_path, "nan")
    with ShardWriter(tmp_path / "empty", 60):
        pass
    empty = ScoreSource(key="k", prefix=str(tmp_path / "empty"), fingerprint="f")
    with pytest.raises(DataError, match="no documents"):
        score(request(folder, tmp_path / "out", sources=[empty]))


def test_the_worker_runs_a_spec_file(folder, tmp_path) -> None:
    request(
        folder, tmp_path / "out", sources=[ScoreSource(key="k", prefix=str(folder / "test"), fingerprint="f")]
    ).save(tmp_path / "spec.json")
    main([str(tmp_path / "spec.json")])
    assert load_scores(tmp_path / "out", "k").num_documents == len(LENGTHS)
