"""The commands on a real forest, as a user types them."""

import json
import shutil

import pytest

from btm.forest import Forest, file_hashes
from btm.records import Evaluation
from tests.conftest import SMOKE, run_btm, two_domains

ROWS = {
    "seed",
    "dense",
    "elm/code",
    "elm/docs",
    "average/uniform",
    "average/posterior",
    "ensemble/uniform",
    "ensemble/updating",
    "ensemble/cached",
    "random_split/ensemble",
}


@pytest.fixture
def own_forest(forest, tmp_path):
    """A copy that a test may change."""
    shutil.copytree(forest, tmp_path / "forest")
    return tmp_path / "forest"


def test_a_run_leaves_a_forest_an_evaluation_and_a_report(forest):
    evaluation = Evaluation.load(forest / "evaluation.json")
    assert set(evaluation.models) >= ROWS
    assert evaluation.domains == ["code", "docs"]
    assert evaluation.novel_domains == ["headers"]
    assert Forest.open(forest).domains == ["code", "docs"]
    assert Forest.open(forest).damages() == []
    assert "<svg" in (forest / "report.html").read_text() or "data:image" in (forest / "report.html").read_text()
    summary = json.loads((forest / "summary.json").read_text())
    assert set(summary["perplexity"]) >= ROWS


def test_b1_the_ledger_of_forest_dense_and_random_split_is_equal(forest):
    """B1: equal tokens and FLOPs, counted by the workers."""
    models = Evaluation.load(forest / "evaluation.json").models
    ledgers = [models[name].ledger for name in ("dense", "ensemble/uniform", "random_split/ensemble")]
    assert all(ledgers)
    assert len({ledger.tokens for ledger in ledgers}) == 1
    assert len({round(ledger.flops) for ledger in ledgers}) == 1
    assert ledgers[0].tokens == 40_960


def test_the_same_command_again_reuses_everything(forest, corpora):
    before = {path: path.stat().st_mtime_ns for path in forest.glob("runs/**/result.json")}
    run_btm("run", *SMOKE, *two_domains(corpora), "baselines=all", f"forest={forest}", cwd=forest)
    assert {path: path.stat().st_mtime_ns for path in forest.glob("runs/**/result.json")} == before


def test_another_configuration_is_refused_with_the_differences(own_forest, corpora):
    """R18: a run never goes on silently with other values."""
    arguments = [*SMOKE, *two_domains(corpora), "baselines=all", f"forest={own_forest}", "train.lr=0.1"]
    done = run_btm("run", *arguments, cwd=own_forest.parent, check=False)
    assert done.returncode == 2
    assert "train.lr: the forest has 0.002, got 0.1" in done.stderr
    assert "allow_config_change=true" in done.stderr


def test_list_inspect_and_status(forest):
    assert "docs" in run_btm("list", f"forest={forest}", cwd=forest).stdout
    listed = json.loads(run_btm("list", f"forest={forest}", "json=true", cwd=forest).stdout)
    assert [elm["domain"] for elm in listed["elms"]] == ["code", "docs"]
    assert "seed" in run_btm("inspect", f"forest={forest}", "domain=docs", cwd=forest).stdout
    status = json.loads(run_btm("status", f"forest={forest}", "json=true", cwd=forest).stdout)
    assert {row["run"]: row["state"] for row in status}["elm/code"] == "finished"


def test_inspect_reports_a_damaged_file(own_forest):
    weights = own_forest / "elms/docs/model.safetensors"
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 4
    weights.unlink()
    weights.write_bytes(content)
    done = run_btm("inspect", f"forest={own_forest}", "domain=docs", cwd=own_forest, check=False)
    assert done.returncode == 1
    assert "does not have the checksum" in done.stderr


@pytest.mark.parametrize("source", ["seed", "posterior", "nearest", "uniform"])
def test_b4_add_and_remove_leave_the_others_untouched(own_forest, corpora, source):
    """B4: every way to branch; the others' files stay byte-identical, lineage is recorded and named on removal."""
    before = {name: file_hashes(own_forest / "elms" / name) for name in ("code", "docs")}
    common = [f"forest={own_forest}", "domain=mail"]
    run_btm("add", *common, f"data.path={corpora / 'mail.jsonl'}", f"branch={source}", cwd=own_forest)
    forest = Forest.open(own_forest)
    assert forest.domains == ["code", "docs", "mail"]
    assert {name: file_hashes(own_forest / "elms" / name) for name in before} == before
    ancestors = forest.elm("mail").ancestors
    assert {"seed": 0, "posterior": 2, "nearest": 1, "uniform": 2}[source] == len(ancestors)
    assert sum(parent.weight for parent in forest.elm("mail").parents) == pytest.approx(1)
    removed = run_btm("remove", f"forest={own_forest}", "domain=code", cwd=own_forest).stdout
    assert ("still carry its data" in removed) == ("code" in ancestors)
    assert Forest.open(own_forest).domains == ["docs", "mail"]


def test_an_existing_model_joins_and_another_tokenizer_does_not(own_forest, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(own_forest / "elms/docs", model)
    run_btm("add", f"forest={own_forest}", "domain=guest", f"model.path={model}", cwd=own_forest)
    guest, original = (Forest.open(own_forest).elm(name) for name in ("guest", "docs"))
    assert guest.origin == "imported"
    assert guest.num_parameters == original.num_parameters > 0
    shown = run_btm("inspect", f"forest={own_forest}", "domain=guest", cwd=own_forest).stdout
    assert f"{guest.num_parameters:,}" in shown
    assert "elsewhere" in shown
    (model / "tokenizer.json").write_text("{}")
    done = run_btm("add", f"forest={own_forest}", "domain=other", f"model.path={model}", cwd=own_forest, check=False)
    assert done.returncode == 1
    assert "another tokenizer" in done.stderr


@pytest.mark.parametrize("method", ["uniform", "weighted", "posterior", "nearest", "greedy_soup"])
def test_merge_writes_a_model_that_transformers_loads(own_forest, method):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    extra = ["merge.weights.code=3", "merge.weights.docs=1"] if method == "weighted" else []
    extra += ["merge.domain=docs"] if method in ("posterior", "nearest", "greedy_soup") else []
    output = own_forest / "out"
    run_btm("merge", f"forest={own_forest}", f"merge={method}", f"merge.output={output}", *extra, cwd=own_forest)
    model = AutoModelForCausalLM.from_pretrained(output)
    tokenizer = AutoTokenizer.from_pretrained(output)
    with torch.inference_mode():
        logits = model(torch.tensor([tokenizer.encode("def f(x):")])).logits
    assert torch.isfinite(logits).all()
    assert "docs" in (output / "README.md").read_text()


def test_generate_continues_a_prompt_with_ensemble_and_elm(forest):
    for model in ("ensemble", "seed", "elm/docs"):
        arguments = [f"forest={forest}", f"generate.model={model}", "generate.max_new_tokens=8"]
        done = run_btm("generate", *arguments, "generate.prompt='The class statement'", cwd=forest)
        assert done.stdout.startswith("The class statement")
        assert len(done.stdout) >= len("The class statement") + 8


def test_evaluate_after_a_removal(own_forest):
    run_btm("remove", f"forest={own_forest}", "domain=code", cwd=own_forest)
    run_btm("evaluate", f"forest={own_forest}", cwd=own_forest)
    evaluation = Evaluation.load(own_forest / "evaluation.json")
    assert "elm/code" not in evaluation.models
    assert evaluation.domains == ["docs"]
    assert "code" in evaluation.novel_domains


def test_doctor_knows_this_machine(tmp_path):
    import torch

    facts = json.loads(run_btm("doctor", "json=true", cwd=tmp_path).stdout)
    assert ["torch", torch.__version__, "training and scoring"] in facts["packages"]
