"""The evaluation: every row, computed from score files alone."""

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from btm.corpus.shards import ShardWriter
from btm.ensemble.posterior import estimate_prior
from btm.errors import EnsembleError, ForestError
from btm.evaluate.score import Scores, load_scores, save_scores
from btm.evaluate.worker import evaluate
from btm.records import Evaluation, Ledger, StepResult
from btm.requests import EvaluateSpec

DOMAINS = ("code", "law")
NOVEL = "news"
LENGTHS = (70, 90, 30, 80, 120, 5, 66, 71, 300, 12, 40, 64)
WORDS = [f"w{number}" for number in range(20)]


def write_scores(folder: Path, row: str, key: str, nats: float, *, seed: int, lengths=LENGTHS) -> None:
    """Scores around ``nats`` per token; the noise belongs to the row, so that rows differ."""
    generator = np.random.default_rng([seed, len(lengths)])
    starts = np.concatenate([[0], np.cumsum(lengths)])
    logp = -np.clip(nats + generator.normal(0, 1.0, starts[-1]), 0.01, None).astype(np.float32)
    save_scores(folder / "scores" / row / f"{key}.npz", Scores(logp, starts, 3 * np.array(lengths)), "request")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("evaluation")
    for number, domain in enumerate((*DOMAINS, NOVEL)):
        for row, nats in (
            ("seed", 4.0),
            ("dense", 3.5),
            ("average/uniform", 4.5),
            (f"average/posterior/{domain}", 3.8),
        ):
            write_scores(folder, row, f"test-{domain}", nats, seed=number)
        for index, elm in enumerate(DOMAINS):
            nats = 3.0 if elm == domain else 3.9
            write_scores(folder, f"elm/{elm}", f"test-{domain}", nats, seed=10 + 10 * index + number)
            write_scores(
                folder, f"elm/{elm}", f"dev-{domain}", nats, seed=50 + 10 * index + number, lengths=LENGTHS[:6]
            )
            write_scores(folder, f"random/{index}", f"test-{domain}", 3.6, seed=90 + 10 * index + number)
        with ShardWriter(folder / "corpus" / domain / "test", 20) as writer:
            for length in LENGTHS:
                writer.add(np.append(np.arange(length - 1) % 19 + 1, 0), num_bytes=3 * length)
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="w1"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="w0").save_pretrained(folder / "tokenizer")
    return folder


def request(folder: Path, output: Path, **changes) -> EvaluateSpec:
    scores, everywhere = folder / "scores", (*DOMAINS, NOVEL)
    rows = ("seed", "dense", "elm/code", "elm/law", "average/uniform")
    cost = Ledger(tokens=10, flops=5.0, seconds=1.0)
    values = {
        "domains": list(DOMAINS),
        "novel_domains": [NOVEL],
        "models": {row: str(scores / row) for row in rows},
        "per_domain_models": {"average/posterior": {d: str(scores / "average/posterior" / d) for d in everywhere}},
        "elms": {elm: str(scores / "elm" / elm) for elm in DOMAINS},
        "random_split": [str(scores / "random" / str(index)) for index in range(2)],
        "ledgers": {"seed": cost, "ensemble": cost + cost, "random_split/ensemble": cost + cost + cost},
        "test_prefixes": {domain: str(folder / "corpus" / domain / "test") for domain in everywhere},
        "tokenizer_dir": str(folder / "tokenizer"),
        "ensemble": {},
        "evaluate": {"bootstrap_samples": 50},
        "sequence_length": 64,
        "output": str(output / "evaluation.json"),
    }
    return EvaluateSpec.model_validate(values | changes)


def perplexity(evaluation: Evaluation, row: str, domain: str) -> float:
    return evaluation.models[row].domains[domain].perplexity


def stacked(folder: Path, key: str) -> tuple[torch.Tensor, np.ndarray]:
    scores = [load_scores(folder / "scores/elm" / elm, key) for elm in DOMAINS]
    return torch.stack([torch.from_numpy(one.logp).double() for one in scores]), scores[0].document_starts


def test_all_rows_are_there_in_order_and_stored(folder, tmp_path) -> None:
    evaluation = evaluate(spec := request(folder, tmp_path))
    assert list(evaluation.models) == [
        *("seed", "dense", "elm/code", "elm/law", "average/uniform", "average/posterior"),
        *("ensemble/uniform", "ensemble/updating", "ensemble/last_token", "ensemble/cached", "ensemble/fixed"),
        "random_split/ensemble",
    ]
    for row in evaluation.models.values():
        assert list(row.domains) == ["code", "law", "news"]
    assert Evaluation.load(tmp_path / "evaluation.json") == evaluation
    assert StepResult.load(tmp_path / "evaluation.json.result").spec_sha256 == spec.sha256


def test_single_models_have_the_perplexity_of_their_scores(folder, tmp_path) -> None:
    evaluation = evaluate(request(folder, tmp_path))
    logp = load_scores(folder / "scores/average/posterior/law", "test-law").logp.astype(np.float64)
    score = evaluation.models["average/posterior"].domains["law"]
    assert math.isclose(score.perplexity, math.exp(-logp.mean()), rel_tol=1e-9)
    assert math.isclose(score.bits_per_byte, -logp.sum() / math.log(2) / (3 * sum(LENGTHS)), rel_tol=1e-9)
    assert score.low < score.perplexity < score.high


def test_p4_the_uniform_ensemble_is_a_mixture_of_document_models(folder, tmp_path) -> None:
    """Each document's likelihood is the mean of its likelihoods under the ELMs: the telescoping identity."""
    evaluation = evaluate(request(folder, tmp_path))
    for domain in (*DOMAINS, NOVEL):
        logp, starts = stacked(folder, f"test-{domain}")
        documents = torch.stack([part.sum(1) for part in logp.split(np.diff(starts).tolist(), 1)], 1)
        total = torch.logsumexp(documents - math.log(2), 0).sum().item()
        assert math.isclose(perplexity(evaluation, "ensemble/uniform", domain), math.exp(-total / logp.shape[1]))


def test_the_cached_prior_comes_from_dev_and_weighs_test(folder, tmp_path) -> None:
    evaluation = evaluate(request(folder, tmp_path, ensemble={"prior_documents": 4}))
    dev, dev_starts = stacked(folder, "dev-law")
    expected = estimate_prior(list(dev.split(np.diff(dev_starts).tolist(), 1))[:4])
    prior = evaluation.cached_priors["law"]
    assert np.allclose(list(prior.values()), expected)
    assert list(prior) == list(DOMAINS)
    assert prior["law"] > 0.8
    logp, starts = stacked(folder, "test-law")
    documents = torch.stack([part.sum(1) for part in logp.split(np.diff(starts).tolist(), 1)], 1)
    total = torch.logsumexp(documents + expected.log()[:, None], 0).sum().item()
    assert math.isclose(perplexity(evaluation, "ensemble/cached", "law"), math.exp(-total / logp.shape[1]))
    fixed = torch.logsumexp(logp + expected.log()[:, None], 0).mean().item()
    assert math.isclose(perplexity(evaluation, "ensemble/fixed", "law"), math.exp(-fixed))


def test_top_k_adds_rows_and_changes_no_other(folder, tmp_path) -> None:
    full = evaluate(request(folder, tmp_path))
    one = evaluate(request(folder, tmp_path, ensemble={"top_k": 1}))
    assert {row: one.models[row] for row in full.models} == full.models
    assert set(one.models) - set(full.models) == {"ensemble/uniform/top-1", "ensemble/cached/top-1"}
    assert math.isclose(perplexity(one, "ensemble/cached/top-1", "law"), perplexity(one, "elm/law", "law"))
    assert evaluate(request(folder, tmp_path, ensemble={"top_k": 2})).models == full.models


def test_temper_and_mode_reach_the_ensemble(folder, tmp_path) -> None:
    flat = evaluate(request(folder, tmp_path, ensemble={"temper": 0.0}))
    last = evaluate(request(folder, tmp_path, ensemble={"posterior": "last_token"}))
    logp, _ = stacked(folder, "test-law")
    mean = torch.logsumexp(logp - math.log(2), 0).mean().item()
    assert math.isclose(perplexity(flat, "ensemble/uniform", "law"), math.exp(-mean))
    assert perplexity(last, "ensemble/uniform", "law") == perplexity(last, "ensemble/last_token", "law")


def test_the_random_split_is_mixed_by_history_with_a_uniform_prior(folder, tmp_path) -> None:
    evaluation = evaluate(request(folder, tmp_path, ensemble={"posterior": "fixed"}))
    scores = [load_scores(folder / f"scores/random/{index}", "test-law") for index in range(2)]
    logp = torch.stack([torch.from_numpy(one.logp).double() for one in scores])
    documents = torch.stack([p.sum(1) for p in logp.split(list(LENGTHS), 1)], 1)
    total = torch.logsumexp(documents - math.log(2), 0).sum().item() / logp.shape[1]
    assert math.isclose(perplexity(evaluation, "random_split/ensemble", "law"), math.exp(-total))


def test_ledgers_and_notes_stand_beside_the_rows(folder, tmp_path) -> None:
    models = evaluate(request(folder, tmp_path, ensemble={"top_k": 1})).models
    assert models["seed"].ledger == Ledger(tokens=10, flops=5.0, seconds=1.0)
    assert models["ensemble/cached/top-1"].ledger == Ledger(tokens=20, flops=10.0, seconds=2.0)
    assert models["random_split/ensemble"].ledger == Ledger(tokens=30, flops=15.0, seconds=3.0)
    assert models["dense"].ledger is None
    assert models["ensemble/cached/top-1"].note == "prior from dev documents, top 1 ELMs"
    assert models["dense"].note == ""


def test_traces_show_a_short_document_token_by_token(folder, tmp_path) -> None:
    """P1, P2: rows sum to 1 and begin with the prior."""
    traces = evaluate(request(folder, tmp_path)).traces
    assert [trace.domain for trace in traces] == ["code", "law", "news"]
    for trace in traces:
        weights = np.array(trace.weights)
        assert weights.shape == (64, 2)
        assert len(trace.tokens) == 64
        assert np.allclose(weights.sum(1), 1, atol=1e-5)
        assert np.allclose(weights[0], 0.5)
    assert traces[1].tokens[:3] == ["w1", "w2", "w3"]
    assert np.array(traces[1].weights)[-1].argmax() == 1


def test_b4_a_removed_elm_leaves_the_ensemble_of_the_others(folder, tmp_path) -> None:
    alone = evaluate(request(folder, tmp_path, elms={"law": str(folder / "scores/elm/law")}))
    for domain in (*DOMAINS, NOVEL):
        for row in ("uniform", "updating", "cached", "fixed", "last_token"):
            assert math.isclose(perplexity(alone, f"ensemble/{row}", domain), perplexity(alone, "elm/law", domain))


def test_no_elms_and_no_baselines_still_give_the_seed(folder, tmp_path) -> None:
    only = {"models": {"seed": str(folder / "scores/seed")}, "per_domain_models": {}, "elms": {}, "random_split": []}
    evaluation = evaluate(request(folder, tmp_path, **only))
    assert list(evaluation.models) == ["seed"]
    assert evaluation.traces == []


def test_models_scored_on_different_documents_are_refused(folder, tmp_path) -> None:
    write_scores(tmp_path, "short", "test-code", 3.0, seed=0, lengths=LENGTHS[:5])
    models = {"seed": str(folder / "scores/seed"), "short": str(tmp_path / "scores/short")}
    with pytest.raises(EnsembleError, match="'seed' and 'short' were scored on different documents"):
        evaluate(request(folder, tmp_path, models=models))


def test_missing_scores_are_named(folder, tmp_path) -> None:
    with pytest.raises(ForestError, match=r"nowhere/test-code.npz does not exist"):
        evaluate(request(folder, tmp_path, models={"seed": str(tmp_path / "nowhere")}))


def test_the_worker_is_a_process_that_repeats_bit_for_bit(folder, tmp_path) -> None:
    spec = request(folder, tmp_path)
    spec.save(tmp_path / "spec.json")
    command = [sys.executable, "-m", "btm.evaluate.worker", str(tmp_path / "spec.json")]
    subprocess.run(command, check=True, timeout=120)
    first = (tmp_path / "evaluation.json").read_bytes()
    evaluate(spec)
    assert (tmp_path / "evaluation.json").read_bytes() == first
    assert json.loads(first)["sequence_length"] == 64
