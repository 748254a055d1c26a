import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from example_forest import example_evaluation, write_forest
from example_sparse import DOMAINS, expert_rows, sparse_evaluation, write_sparse_run
from test_report import Page, assert_self_contained

from btm.config_ffn import FfnConfig, FfnLayer
from btm.evaluate.plots_experts import DomainShares
from btm.evaluate.report import report_page, write_report
from btm.evaluate.report_data import ReportData, dev_curves_of, load_report_data
from btm.evaluate.report_experts import chosen, class_shares, domain_shares, expert_parts, expert_series, specialisation
from btm.evaluate.report_verdicts import headline, verdicts
from btm.records import Ledger


def claims(data: ReportData) -> dict[str, str]:
    return {verdict.claim: verdict.outcome for verdict in verdicts(data)}


@pytest.fixture
def top_k(tmp_path: Path) -> Path:
    path = tmp_path / "run"
    write_sparse_run(path, FfnConfig(layer=FfnLayer.top_k), blocks=[1, 3], num_experts=8)
    return path


def test_series_are_what_the_metrics_say_by_layer() -> None:
    rows = expert_rows([1, 10], 4)
    series = expert_series(rows)
    assert set(series) == {"load", "entropy", "dropped", "unrouted", "load_balance"}
    assert [one.block for one in series["load"]] == [1, 10]
    assert series["dropped"][1].tokens == [update * 1024 for update in range(2, 42, 2)]
    assert series["dropped"][1].values == [row["experts/10/dropped"] for row in rows[:-1]]
    assert expert_series([{"update": 2, "tokens": 5, "experts/0/load": float("nan"), "experts/0/z": "x"}]) == {}


def test_shares_come_from_the_last_dev_row_and_sum_to_one() -> None:
    first = {"update": 1, "tokens": 1, "eval/law/experts/0": [1, 0], "eval/a/experts/0": [0, 1]}
    last = {"update": 2, "tokens": 2, "eval/law/experts/0": [6, 2], "eval/a/experts/0": [0, 0]}
    (layer,) = domain_shares([first, last, {"update": 3, "tokens": 3, "train/loss": 1.0}])
    assert (layer.block, layer.domains) == (0, ["law", "a"])
    assert layer.shares.tolist() == [[0.75, 0.25], [0.0, 0.0]]


def test_classes_of_tokens_are_kept_apart_from_domains() -> None:
    row = {"update": 1, "tokens": 1, "eval/law/experts/0": [1, 0], "classes/number/experts/0": [1, 3]}
    (layer,) = class_shares([row])
    assert (layer.domains, layer.shares.tolist()) == (["number"], [[0.25, 0.75]])
    assert [layer.domains for layer in domain_shares([row])] == [["law"]]
    assert class_shares([{"update": 1, "tokens": 1, "eval/law/experts/0": [1, 0]}]) == []


@pytest.mark.parametrize("damaged", [[], "x", [1, "x"], [1, float("nan")], [1, -1], [True, 1], None, [3]])
def test_damaged_counts_are_left_out(damaged: Any) -> None:
    (layer,) = domain_shares([{"update": 1, "eval/law/experts/0": damaged, "eval/code/experts/0": [1, 3]}])
    assert layer.domains == ["code"]


@pytest.mark.parametrize(
    ("shares", "bits"),
    [
        ([[1, 0], [0, 1]], 1.0),
        ([[0.5, 0.5, 0, 0], [0, 0, 0.5, 0.5]], 1.0),
        ([[0.3, 0.7], [0.3, 0.7]], 0.0),
        ([[1, 0], [0, 0]], 0.0),
        (np.eye(4).tolist(), 2.0),
        # I(D; E) = H(E) - H(E | D) by hand: H(1/2) - H(3/4, 1/4) bits.
        ([[0.75, 0.25], [0.25, 0.75]], 1 - 0.8112781),
    ],
)
def test_specialisation_is_the_information_of_the_expert_on_the_domain(shares: list[Any], bits: float) -> None:
    layer = DomainShares(0, [str(row) for row in range(len(shares))], np.array(shares, dtype=float))
    assert specialisation(layer) == pytest.approx(bits, abs=1e-6)


def test_a_few_of_many_layers_are_chosen_evenly() -> None:
    layers = [DomainShares(block, ["law"], np.ones((1, 1))) for block in range(31)]
    assert [layer.block for layer in chosen(layers)] == [0, 6, 12, 18, 24, 30]
    assert [layer.block for layer in chosen(layers[:3])] == [0, 1, 2]


def test_a_sparse_run_has_a_section_on_its_layers(top_k: Path) -> None:
    page = assert_self_contained(write_report(top_k).read_text())
    images = [attributes["alt"] for tag, attributes in page.elements if tag == "img"]
    assert any("Each expert layer over training" in alt and "load_balance 0.01" in alt for alt in images)
    assert any("An even split is 12.5 %" in alt for alt in images)
    text = page.text
    assert "2 blocks have expert layers (1, 3, counted from 0 at the input)" in text
    assert "No token was left without an expert in any update" in text
    # Two domains at 9 : 1 and 1 : 9 over halves of the experts: 1 - H(0.9, 0.1) bits.
    assert " 0.53 " in text
    before_configuration = text.partition("The run again")[0]
    assert not any(word in before_configuration for word in ("ELM", "seed", "Forest", "posterior"))


def test_a_demix_run_speaks_of_domains_and_not_of_elms(tmp_path: Path) -> None:
    write_sparse_run(tmp_path / "run", FfnConfig(layer=FfnLayer.demix), blocks=[0], num_experts=2)
    text = Page(write_report(tmp_path / "run").read_text()).text
    assert "Weights of the domains' models" in text
    assert "the domain of each document being known" in text
    assert "ELM" not in text
    assert "Forest" not in text


def test_dev_curves_compare_the_sparse_with_the_dense_model(top_k: Path) -> None:
    curves = dev_curves_of(load_report_data(top_k))
    assert {domain: [curve.name for curve in found] for domain, found in curves.items()} == {
        domain: ["sparse", "dense"] for domain in DOMAINS
    }


def test_a_forest_has_no_such_section(tmp_path: Path) -> None:
    write_forest(tmp_path / "forest", ["go-code", "law"], [], added=None)
    data = load_report_data(tmp_path / "forest")
    assert not data.is_sparse
    assert expert_parts(data) == []
    assert "Expert layers" not in report_page(data, "x")


def test_lost_and_damaged_metrics_of_a_sparse_run_give_a_report(top_k: Path) -> None:
    metrics = top_k / "runs/sparse/metrics.jsonl"
    hostile = {"update": 50, "tokens": 50, "eval/<script>/experts/1": [1, 2], "experts/1/load": "<b>"}
    metrics.write_text(json.dumps(hostile) + "\n")
    (top_k / "runs/sparse/spec.json").unlink()
    page = assert_self_contained(write_report(top_k).read_text())
    assert "The expert layers logged no metrics" in page.text
    metrics.unlink()
    assert "nothing is known of its expert layers" in Page(write_report(top_k).read_text()).text


def test_a_sparse_model_is_judged_against_the_dense_one() -> None:
    data = ReportData(evaluation=sparse_evaluation(FfnLayer.top_k))
    assert claims(data) == {
        "The sparse model beats the dense model": "holds",
        "The sparse and the dense model were trained on equally many tokens": "holds",
    }
    assert headline(verdicts(data)) == "All 2 measured relations hold."
    worse = ReportData(evaluation=sparse_evaluation(FfnLayer.base, factor={"sparse": 1.2}))
    assert claims(worse)["The sparse model beats the dense model"] == "fails"


def test_the_mixture_of_a_demix_model_is_judged_as_such() -> None:
    evaluation = sparse_evaluation(FfnLayer.demix, factor={"ensemble/uniform": 1.3})
    found = claims(ReportData(evaluation=evaluation))
    assert found["The sparse model, the domain of each document being known, beats the dense model"] == "holds"
    assert found["The mixture of the DEMix model's domains, the domain unknown, beats the dense model"] == "fails"
    assert len(found) == 3
    assert not any("ELM" in claim for claim in found)


def test_unequal_tokens_fail_and_other_flops_are_told() -> None:
    evaluation = sparse_evaluation(FfnLayer.top_k)
    dense = evaluation.models["dense"]
    evaluation.models["dense"] = dense.model_copy(update={"ledger": Ledger(tokens=40_960, flops=1.9e10, seconds=1)})
    *_, budget = verdicts(ReportData(evaluation=evaluation))
    assert budget.outcome == "holds"
    assert "tokens differ by 0 % (1 % is allowed), their FLOPs by 50 %" in budget.finding
    evaluation.models["dense"] = dense.model_copy(update={"ledger": Ledger(tokens=30_720, flops=3.8e10, seconds=1)})
    assert verdicts(ReportData(evaluation=evaluation))[-1].outcome == "fails"
    del evaluation.models["dense"]
    assert {verdict.outcome for verdict in verdicts(ReportData(evaluation=evaluation))} == {"not measured"}
    assert "baselines.dense=true" in verdicts(ReportData(evaluation=evaluation))[0].finding


def test_nothing_is_expected_of_one_expert() -> None:
    """The ensemble and both averages of one ELM are that ELM; a DEMix model of one domain is the dense model."""
    forest = example_evaluation(["law"], ["poetry"])
    for evaluation in (forest, sparse_evaluation(FfnLayer.demix, ["law"])):
        found = verdicts(ReportData(evaluation=evaluation))
        assert found == []
        assert "one expert" in headline(found)
    joined = ReportData(evaluation=forest, later={"poetry": example_evaluation(["law"], ["poetry"], added="poetry")})
    assert claims(joined) == {"The forest reads poetry better once it has an ELM for it": "holds"}


def test_a_sparse_run_without_an_evaluation_says_so() -> None:
    (verdict,) = verdicts(ReportData(config={"ffn": {"layer": "base"}}))
    assert (verdict.claim, verdict.outcome) == ("The sparse model beats one dense model", "not measured")
