"""`btm run ffn=...`: one sparse model instead of a forest, as a user types it."""

import json

import pytest

from btm.model.causal_lm import load_model
from btm.records import Evaluation, TrainResult
from tests.conftest import SMOKE, run_btm, two_domains


@pytest.mark.parametrize("kind", ["demix", "top_k", "base"])
def test_a_sparse_and_a_dense_model_are_trained_and_compared_at_equal_tokens(sparse_run, kind):
    forest, _, printed = sparse_run(kind)
    evaluation = Evaluation.load(forest / "evaluation.json")
    rows = {"sparse", "dense"} | ({"ensemble/uniform", "ensemble/cached"} if kind == "demix" else set())
    assert rows <= set(evaluation.models)
    assert not any(name.startswith(("elm/", "seed", "average")) for name in evaluation.models)
    assert set(evaluation.models["dense"].domains) == {"code", "docs", "headers"}
    # With the domain known there is no model of a domain that nobody trained on; the mixtures read it.
    novel = {"headers"} if kind != "demix" else set()
    assert set(evaluation.models["sparse"].domains) == {"code", "docs"} | novel
    ledgers = [evaluation.models[name].ledger for name in ("sparse", "dense")]
    assert ledgers[0].tokens == ledgers[1].tokens == 40_960
    assert ledgers[0].flops == pytest.approx(ledgers[1].flops, rel=0.01)
    results = [TrainResult.load(forest / "runs" / name / "result.json") for name in ("sparse", "dense")]
    assert results[0].num_parameters > 1.2 * results[1].num_parameters
    assert results[0].realised_tokens["code"] == results[0].realised_tokens["docs"]
    summary = json.loads((forest / "summary.json").read_text())
    assert set(summary["perplexity"]) >= rows
    claims = [relation["claim"] for relation in summary["relations"]]
    assert claims[0] == "the sparse model beats the dense model of equal tokens"
    assert len(claims) == (2 if kind == "demix" else 1)
    assert "sparse" in printed
    assert "data:image" in (forest / "report.html").read_text() or "<svg" in (forest / "report.html").read_text()


def test_metrics_say_where_the_tokens_of_each_domain_went(sparse_run):
    forest, _, _ = sparse_run("demix")
    rows = [json.loads(line) for line in (forest / "runs/sparse/metrics.jsonl").read_text().splitlines()]
    last = [row for row in rows if "eval/code/loss" in row][-1]
    for block in (0, 1):
        assert last[f"eval/code/experts/{block}"][1] == last[f"eval/docs/experts/{block}"][0] == 0
        assert last[f"eval/code/experts/{block}"][0] > 0 < last[f"eval/docs/experts/{block}"][1]


def test_the_same_command_again_reuses_everything_and_other_experts_are_refused(sparse_run):
    forest, arguments, _ = sparse_run("demix")
    before = {path: path.stat().st_mtime_ns for path in forest.glob("runs/**/result.json")}
    run_btm("run", *arguments, f"forest={forest}", cwd=forest)
    assert {path: path.stat().st_mtime_ns for path in forest.glob("runs/**/result.json")} == before
    other = [argument if argument != "ffn=demix" else "ffn=top_k" for argument in arguments]
    refused = run_btm("run", *other, f"forest={forest}", cwd=forest, check=False)
    assert refused.returncode == 2
    assert "ffn.layer: the forest has 'demix', got 'top_k'" in refused.stderr


def test_evaluate_measures_a_sparse_model_again(sparse_run):
    forest, _, _ = sparse_run("top_k")
    before = Evaluation.load(forest / "evaluation.json")
    for name in ("evaluation.json", "evaluation.json.result"):
        (forest / name).unlink()
    run_btm("evaluate", f"forest={forest}", cwd=forest)
    assert Evaluation.load(forest / "evaluation.json") == before


@pytest.mark.parametrize(
    ("kind", "model"), [("demix", "ensemble"), ("demix", "sparse/code"), ("top_k", "sparse"), ("top_k", "dense")]
)
def test_generate_continues_with_each_of_the_models(sparse_run, kind, model):
    forest, _, _ = sparse_run(kind)
    arguments = [f"forest={forest}", f"generate.model={model}", "generate.prompt=import", "generate.max_new_tokens=4"]
    assert run_btm("generate", *arguments, cwd=forest).stdout.startswith("import")


def test_no_elm_joins_a_sparse_model(sparse_run, corpora):
    forest, _, _ = sparse_run("top_k")
    arguments = [f"forest={forest}", "domain=mail", f"data.path={corpora / 'mail.jsonl'}"]
    refused = run_btm("add", *arguments, cwd=forest, check=False)
    assert refused.returncode == 2
    assert "which no ELM can join" in refused.stderr


def test_an_expert_of_a_domain_joins_a_forest(sparse_run, forest, tmp_path):
    """The dense model of a DEMix domain is an ordinary model of the forest's architecture."""
    from btm.model.causal_lm import save_model

    directory, _, _ = sparse_run("demix")
    import torch

    expert = load_model(directory / "runs/sparse/model", domain="code")
    save_model(expert, tmp_path / "expert", torch.float32, directory / "tokenizer")
    ours, theirs = load_model(tmp_path / "expert"), load_model(forest / "elms/code")
    assert [(name, p.shape) for name, p in ours.named_parameters()] == [
        (name, p.shape) for name, p in theirs.named_parameters()
    ]


def test_a_plan_is_shown_without_running_anything(corpora, tmp_path):
    done = run_btm(
        "run", *SMOKE, *two_domains(corpora), "ffn=base", "baselines=dense", "dry_run=true",
        f"forest={tmp_path / 'forest'}", cwd=tmp_path,
    )  # fmt: skip
    assert "sparse" in done.stdout
    assert "elm/" not in done.stdout
    assert not (tmp_path / "forest").exists()
