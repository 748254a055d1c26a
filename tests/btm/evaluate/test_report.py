import base64
import html.parser
import itertools
import json
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree
from pathlib import Path
from typing import Any

import pytest
from example_forest import EIGHT, NOVEL, example_evaluation, write_forest
from hydra.core.override_parser.overrides_parser import OverridesParser

from btm.errors import ForestError
from btm.evaluate.report import main, report_page, write_report
from btm.evaluate.report_data import ReportData, load_report_data, loss_curves_of
from btm.evaluate.report_reproduce import overrides
from btm.evaluate.report_verdicts import headline, verdicts
from btm.records import Evaluation, Ledger

HOSTILE = "</script><script>alert(1)</script><img src=http://evil onerror=x>\x1b[31m'\"&amp;\u202e"
VOID = {"meta", "img", "br", "link", "input"}


class Page(html.parser.HTMLParser):
    """Elements, attributes and text of a page; fails on badly nested tags."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.open: list[str] = []
        self.parts: list[str] = []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.parts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.parts).split())

    def attributes(self, *names: str) -> list[str]:
        return [value for _, attributes in self.elements for name, value in attributes.items() if name in names]


@pytest.fixture(scope="module")
def forest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("report") / "forest"
    write_forest(path)
    return path


@pytest.fixture(scope="module")
def page_text(forest: Path) -> str:
    return write_report(forest).read_text()


def assert_self_contained(text: str) -> Page:
    page = Page(text)
    for value in page.attributes("src", "href", "srcset", "action", "data", "poster"):
        assert value.startswith(("data:image/svg+xml;base64,", "#")), value[:80]
    tags = {tag for tag, _ in page.elements}
    assert not tags & {"script", "link", "iframe", "object", "embed", "form", "base"}
    assert not [name for _, attributes in page.elements for name in attributes if name.startswith("on")]
    style = text[text.index("<style>") : text.index("</style>")]
    assert "url(" not in style
    assert "@import" not in style
    for source in page.attributes("src"):
        drawing = xml.etree.ElementTree.fromstring(base64.b64decode(source.partition(",")[2]))
        for element in drawing.iter():
            assert not str(element.tag).endswith(("}script", "}foreignObject", "}image"))
            links = [value for key, value in element.items() if key.endswith("href")]
            assert all(link.startswith("#") for link in links)
    return page


def with_evaluation(**changes: Any) -> ReportData:
    return ReportData(evaluation=example_evaluation(["law", "code"], ["poetry"], **changes))


def outcome(data: ReportData, claim: str) -> tuple[str, str]:
    (found,) = [verdict for verdict in verdicts(data) if claim in verdict.claim]
    return found.outcome, found.finding


def test_the_report_is_one_small_self_contained_file(page_text: str) -> None:
    page = assert_self_contained(page_text)
    assert len(page_text.encode()) < 5_000_000
    assert "Content-Security-Policy" in page_text
    ids = page.attributes("id")
    assert len(ids) == len(set(ids))
    assert {link.removeprefix("#") for link in page.attributes("href")} == set(ids)


def test_headings_tables_and_pictures_are_semantic(page_text: str) -> None:
    page = Page(page_text)
    levels = [int(tag[1]) for tag, _ in page.elements if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    images = [attributes for tag, attributes in page.elements if tag == "img"]
    assert len(images) >= 9
    assert all(len(attributes["alt"]) > 20 for attributes in images)
    assert all("scope" in attributes for tag, attributes in page.elements if tag == "th")
    assert ("html", {"lang": "en"}) in page.elements


def test_every_part_is_there(page_text: str) -> None:
    text = Page(page_text).text
    for words in ("Summary", "Perplexity", "Training", "Domain posterior", "Domains added later", "Ledger", "Lineage"):
        assert words in text
    for name in (*EIGHT, *NOVEL, "random_split/ensemble", "average/posterior"):
        assert name in text
    assert "All 6 measured relations hold." in text
    assert "1,638,400" in text
    assert "name=demo" in text
    assert "Not in this report" not in text


def test_the_report_needs_no_heavy_imports(forest: Path, tmp_path: Path) -> None:
    shutil.copytree(forest, tmp_path / "copy")
    script = (
        "import sys; from btm.evaluate.report import main\n"
        "assert main(sys.argv[1:]) == 0\n"
        "assert not {'torch', 'transformers', 'ray', 'wandb', 'datasets'} & set(sys.modules)\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "copy")]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=100)
    assert done.stdout.strip() == str(tmp_path / "copy" / "report.html")
    assert done.stderr == ""


def test_verdicts_name_figures_and_hold() -> None:
    state, finding = outcome(with_evaluation(), "one dense model")
    assert state == "holds"
    assert "ensemble/uniform is lower on 2 of 2 domains" in finding
    assert "12.2 % lower" in finding


@pytest.mark.parametrize(
    ("row", "factor", "claim"),
    [
        ("dense", 0.9, "one dense model"),
        ("random_split/ensemble", 1.0, "random split"),
        ("average/posterior", 1.9, "weighted by the posterior"),
    ],
)
def test_a_relation_that_fails_is_said_plainly(row: str, factor: float, claim: str) -> None:
    data = with_evaluation(factor={row: factor})
    state, finding = outcome(data, claim)
    assert state == "fails"
    assert "higher" in finding
    assert headline(verdicts(data)) == "1 of 5 measured relations fail."
    text = Page(report_page(data, "x")).text
    assert "1 of 5 measured relations fail." in text
    assert "fails" in text


def test_an_elm_that_is_not_the_best_on_its_domain_is_named() -> None:
    data = with_evaluation(factor={"elm/code": 0.5})
    assert outcome(data, "own domain") == ("fails", "Another ELM reads law better (1 of 2).")


def test_unequal_budgets_are_found() -> None:
    data = with_evaluation()
    assert outcome(data, "equal budgets")[0] == "holds"
    models = data.evaluation.models
    models["dense"] = models["dense"].model_copy(update={"ledger": Ledger(tokens=3_300_000, flops=9.5e13, seconds=9)})
    assert outcome(data, "equal budgets")[0] == "holds"
    models["dense"] = models["dense"].model_copy(update={"ledger": Ledger(tokens=3_400_000, flops=9.5e13, seconds=9)})
    state, finding = outcome(data, "equal budgets")
    assert state == "fails"
    assert "3.6 %" in finding


def test_what_was_not_measured_is_said_with_the_remedy() -> None:
    data = with_evaluation()
    del data.evaluation.models["dense"]
    del data.evaluation.models["random_split/ensemble"].domains["code"]
    state, finding = outcome(data, "one dense model")
    assert state == "not measured"
    assert "baselines.dense=true" in finding
    assert outcome(data, "random split")[0] == "not measured"
    assert headline(verdicts(data)) == "All 3 measured relations hold. 2 were not measured."
    assert headline(verdicts(ReportData())) == "None of the expected relations was measured."


def test_an_added_domain_is_judged_by_both_evaluations(forest: Path) -> None:
    data = load_report_data(forest)
    state, finding = outcome(data, "sqlite-docs")
    assert state == "holds"
    assert "131.6 before, 87.73 after, 33.3 % lower" in finding
    assert "byte-identical" in finding
    data.summary["added_domain"]["unchanged"] = False
    state, finding = outcome(data, "sqlite-docs")
    assert state == "fails"
    assert "CHANGED" in finding
    data.later.clear()
    data.summary["added_domain"] = [{"name": "tax", "perplexity_before": 90.0, "perplexity_after": 95.0}]
    assert outcome(data, "tax")[0] == "fails"


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("forest.json", "The manifest"),
        ("config.json", "The configuration"),
        ("evaluation.json", "The evaluation"),
        ("runs/seed/spec.json", "The request of the run seed"),
        ("runs/elm/go-code/result.json", "The result of the run elm/go-code"),
    ],
)
def test_missing_and_damaged_parts_are_said_not_crashed_on(tmp_path: Path, name: str, sentence: str) -> None:
    path = tmp_path / "forest"
    write_forest(path, ["go-code", "law"], [], added=None)
    (path / name).write_bytes(b"\x00\xff")
    assert f"{sentence} cannot be read" in " ".join(load_report_data(path).missing)
    (path / name).write_text('{"models": 3}')
    load_report_data(path)
    (path / name).write_text("{")
    text = assert_self_contained(report_page(load_report_data(path), "forest")).text
    assert f"{sentence} cannot be read" in text
    assert str(tmp_path) not in text
    (path / name).unlink()
    assert f"{sentence} is missing" in " ".join(load_report_data(path).missing)


def test_torn_metrics_and_an_empty_forest_give_a_report(tmp_path: Path) -> None:
    write_forest(tmp_path / "forest", ["go-code", "law"], [], added=None)
    with open(tmp_path / "forest/runs/seed/metrics.jsonl", "a") as file:
        file.write('rubbish\n{"update": 999, "tokens": "x", "train/loss": NaN}\n{"upd')
    text = Page(write_report(tmp_path / "forest").read_text()).text
    assert "runs/seed/metrics.jsonl has 1 broken lines" in text
    (tmp_path / "empty").mkdir()
    text = assert_self_contained(write_report(tmp_path / "empty").read_text()).text
    assert "None of the expected relations was measured." in text
    assert "The manifest is missing (forest.json)." in text


def test_branches_begin_where_the_seed_ended_whichever_tokens_are_logged(forest: Path, tmp_path: Path) -> None:
    curves = {curve.name: curve for curve in loss_curves_of(load_report_data(forest))}
    assert curves["elm/go-code"].tokens[0] == 1_638_400 + 10_240
    assert curves["dense"].tokens[-1] == 3_276_800
    shutil.copytree(forest, tmp_path / "copy")
    path = tmp_path / "copy/runs/elm/go-code/metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(row | {"tokens": row["tokens"] + 1_638_400}) + "\n" for row in rows))
    again = {curve.name: curve for curve in loss_curves_of(load_report_data(tmp_path / "copy"))}
    assert again["elm/go-code"].tokens == curves["elm/go-code"].tokens


def test_hostile_names_tokens_and_notes_stay_text(tmp_path: Path) -> None:
    """R15, R18: nothing that a forest holds can act in the reader's browser."""
    path = tmp_path / "forest"
    write_forest(path, ["law", "code"], ["poetry"], added=None)
    text = (
        (path / "evaluation.json").read_text().replace('"law"', json.dumps(HOSTILE)).replace('"elm/law"', '"elm/$x^"')
    )
    evaluation = Evaluation.model_validate_json(text)
    evaluation.models["dense"] = evaluation.models["dense"].model_copy(update={"note": HOSTILE})
    evaluation.traces[0].tokens[:] = [HOSTILE, "<b>", "</p></details>", "\n", "\x00"] * 40
    evaluation.save(path / "evaluation.json")
    manifest = json.loads((path / "forest.json").read_text())
    manifest["name"] = manifest["elms"][0]["domain"] = manifest["elms"][0]["created"] = HOSTILE
    (path / "forest.json").write_text(json.dumps(manifest))
    config = json.loads((path / "config.json").read_text())
    config["name"] = config["data"]["text_field"] = HOSTILE
    (path / "config.json").write_text(json.dumps(config))
    written = write_report(path).read_text()
    page = assert_self_contained(written)
    assert "\x1b" not in written
    assert "\u202e" not in written
    assert "<script>alert(1)</script>" in page.text


def test_secrets_in_a_configuration_are_not_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """R15: fake keys in environment and configuration."""
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef0123456789abcdef01234567")
    path = tmp_path / "forest"
    write_forest(path, ["law", "code"], [], added=None)
    config = json.loads((path / "config.json").read_text())
    config["tracking"]["api_key"] = "plainly-a-secret"
    config["tracking"]["entity"] = "0123456789abcdef0123456789abcdef01234567"
    (path / "config.json").write_text(json.dumps(config))
    written = write_report(path).read_text()
    assert "plainly-a-secret" not in written
    assert "0123456789abcdef0123456789abcdef01234567" not in written
    assert "[redacted]" in written


@pytest.mark.parametrize(
    "value",
    [
        "a",
        "a b",
        "it's",
        "back\\slash",
        "end\\",
        "\\'",
        "null",
        "1e-3",
        "12",
        "${x}",
        "a=b,c",
        "",
        "[x]",
        3,
        0.002,
        True,
        None,
        ["a b", "c'd"],
    ],
)
def test_the_command_gives_hydra_the_same_values(value: Any) -> None:
    (override,) = overrides({"data": {"text_field": value}})
    key, _, text = override.partition("=")
    assert key == "data.text_field"
    assert OverridesParser.create().parse_override(f"key={text}").value() == value


def test_the_command_names_only_what_differs_from_the_defaults(forest: Path) -> None:
    assert overrides(load_report_data(forest).config) == ["name=demo", "forest=outputs/demo"]


def test_the_command_line_reports_a_wrong_directory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "none")]) == 1
    assert "is no directory" in capsys.readouterr().err
    with pytest.raises(ForestError):
        write_report(tmp_path / "none")
