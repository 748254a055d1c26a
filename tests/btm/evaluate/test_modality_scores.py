"""Losses of text and of image tokens apart: in the evaluation, its table, the summary and the report."""

import io
import json
import math
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from btm.corpus.images.vocabulary import loss_by_modality, modality_table
from btm.corpus.shards import ShardWriter, TokenShard
from btm.evaluate.report import report_page
from btm.evaluate.report_data import ReportData
from btm.evaluate.score import Scores, load_scores, save_scores
from btm.evaluate.worker import evaluate
from btm.modality_table import modality_table as loss_table
from btm.records import Evaluation
from btm.requests import EvaluateSpec
from btm.summary import write_summary

LENGTHS = (9, 14, 5, 20)
CODES, WORDS = 6, 10
ROWS = ("sparse", "dense")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Scores of two models on a domain of text and on one whose documents hold pictures of four codes."""
    folder = tmp_path_factory.mktemp("pictured")
    tokenizer = Tokenizer(models.WordLevel({f"w{n}": n for n in range(WORDS)}, unk_token="w1"))
    names = ["<image>", "</image>", *(f"<image:0123456789ab:{code}>" for code in range(CODES))]
    tokenizer.add_special_tokens(names)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="w0").save_pretrained(folder / "tokenizer")
    generator = np.random.default_rng(0)
    for domain in ("text", "pictures"):
        with ShardWriter(folder / "corpus" / domain / "test", WORDS + 2 + CODES) as writer:
            for place, length in enumerate(LENGTHS):
                ids = generator.integers(1, WORDS, length)
                if domain == "pictures" and place != 2:
                    ids[1:7] = [WORDS, *(WORDS + 2 + generator.integers(0, CODES, 4)), WORDS + 1]
                writer.add(np.append(ids[:-1], 0), num_bytes=3 * length)
        for number, row in enumerate(ROWS):
            logp = -generator.exponential(2.0 + number, sum(LENGTHS)).astype(np.float32)
            starts = np.concatenate([[0], np.cumsum(LENGTHS)])
            scores = Scores(logp, starts, 3 * np.array(LENGTHS))
            save_scores(folder / "scores" / row / f"test-{domain}.npz", scores, "request")
    return folder


def evaluated(folder: Path, output: Path, pictured: list[str]) -> Evaluation:
    request = {
        "domains": ["text", "pictures"],
        "novel_domains": [],
        "models": {row: str(folder / "scores" / row) for row in ROWS},
        "elms": {},
        "test_prefixes": {domain: str(folder / "corpus" / domain / "test") for domain in ("text", "pictures")},
        "pictured": pictured,
        "tokenizer_dir": str(folder / "tokenizer"),
        "ensemble": {},
        "evaluate": {"bootstrap_samples": 200},
        "sequence_length": 64,
        "output": str(output / "evaluation.json"),
    }
    return evaluate(EvaluateSpec.model_validate(request))


def test_each_modality_has_the_mean_loss_of_its_tokens(folder, tmp_path):
    evaluation = evaluated(folder, tmp_path, ["pictures"])
    ids = np.asarray(TokenShard(str(folder / "corpus/pictures/test")).tokens, dtype=np.int64)
    for row in ROWS:
        score = evaluation.models[row].domains["pictures"]
        logp = load_scores(folder / "scores" / row, "test-pictures").logp
        expected = loss_by_modality(logp, ids, modality_table(folder / "tokenizer"))
        assert set(score.modalities) == {"text", "image"}
        for kind, loss in expected.items():
            one = score.modalities[kind]
            assert math.log(one.perplexity) == pytest.approx(loss, rel=1e-6)
            assert one.low < one.perplexity < one.high
        assert score.modalities["image"].tokens == 12
        assert sum(one.tokens for one in score.modalities.values()) == score.tokens
        whole = sum(math.log(one.perplexity) * one.tokens for one in score.modalities.values())
        assert math.log(score.perplexity) == pytest.approx(whole / score.tokens)


def test_text_alone_is_evaluated_and_stored_as_ever(folder, tmp_path):
    with_pictures = evaluated(folder, tmp_path, ["pictures"])
    assert with_pictures.models["dense"].domains["text"].modalities == {}
    plain = evaluated(folder, tmp_path, [])
    stored = json.loads((tmp_path / "evaluation.json").read_text())
    keys = {"perplexity", "low", "high", "bits_per_byte", "tokens"}
    assert set(stored["models"]["dense"]["domains"]["pictures"]) == keys
    assert Evaluation.load(tmp_path / "evaluation.json") == plain
    assert loss_table(plain) is None
    assert "loss_by_modality" not in write_summary(tmp_path, [])
    for row in ROWS:
        before, after = plain.models[row].domains["pictures"], with_pictures.models[row].domains["pictures"]
        assert before == after.model_copy(update={"modalities": {}})


def test_table_summary_and_report_show_them(folder, tmp_path):
    evaluation = evaluated(folder, tmp_path, ["pictures"])
    losses = {
        row: {kind: math.log(one.perplexity) for kind, one in scores.domains["pictures"].modalities.items()}
        for row, scores in evaluation.models.items()
    }
    file = io.StringIO()
    Console(file=file, width=100).print(loss_table(evaluation))
    printed = next(line for line in file.getvalue().splitlines() if line.split()[:1] == ["dense"]).split()[1:]
    assert [value.rstrip("*") for value in printed] == [f"{losses['dense'][kind]:.3f}" for kind in ("text", "image")]
    best = [min(ROWS, key=lambda row: losses[row][kind]) == "dense" for kind in ("text", "image")]
    assert [value.endswith("*") for value in printed] == best
    summary = write_summary(tmp_path, [])
    assert {row: domains["pictures"] for row, domains in summary["loss_by_modality"].items()} == losses
    page = report_page(ReportData(evaluation=evaluation), "example")
    assert "pictures: image" in page
    assert f"{losses['sparse']['image']:.3f}" in page
