import io
import re

import pytest
from rich.console import Console

from btm.records import DomainScore, ElmRecord, Evaluation, ForestManifest, Ledger, ModelScores, Parent
from btm.tables import (
    elm_table,
    evaluation_json,
    evaluation_table,
    forest_table,
    format_bytes,
    format_count,
    format_duration,
    format_flops,
    format_perplexity,
    key_value_table,
    rows_table,
)

CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f\x9b]")
HOSTILE = "x\x1b[31m[bold]y[/bold]\r\u202e"


def score(perplexity: float) -> DomainScore:
    return DomainScore(
        perplexity=perplexity, low=perplexity * 0.97, high=perplexity * 1.03, bits_per_byte=1.9, tokens=9
    )


def evaluation(domains: list[str], novel: list[str], names: list[str]) -> Evaluation:
    models = {}
    for position, name in enumerate(names):
        rows = {domain: score(80 + 10 * position + index) for index, domain in enumerate([*domains, *novel])}
        ledger = Ledger(tokens=3_276_800, flops=9.5e13, seconds=440)
        models[name] = ModelScores(domains=rows, ledger=ledger)
    return Evaluation(domains=domains, novel_domains=novel, models=models, sequence_length=256)


def render(table: object, width: int = 100, **options: bool) -> str:
    file = io.StringIO()
    Console(file=file, width=width, **options).print(table)
    return file.getvalue()


def record(domain: str, parents: list[Parent]) -> ElmRecord:
    return ElmRecord(
        domain=domain,
        directory=f"elms/{domain}",
        parents=parents,
        ledger=Ledger(tokens=204_800, flops=5.9e12, seconds=61),
        data_fingerprint="cd" * 32,
        files={"model.safetensors": "ef" * 32},
        num_parameters=4_300_000,
        dev_loss={domain: 4.52},
        created="2026-03-01T12:00:00+00:00",
    )


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        (format_count(0), "0"),
        (format_count(987), "987"),
        (format_count(12_345), "12.3K"),
        (format_count(999_999), "1.00M"),
        (format_count(3_276_800), "3.28M"),
        (format_flops(9.5e13), "95.0T"),
        (format_flops(0), "-"),
        (format_bytes(268e6), "268 MB"),
        (format_bytes(12), "12 B"),
        (format_duration(0.04), "0.0 s"),
        (format_duration(59.7), "1 min 00 s"),
        (format_duration(200), "3 min 20 s"),
        (format_duration(3720), "1 h 02 min"),
        (format_duration(273_600), "3 d 04 h"),
        (format_duration(float("inf")), "-"),
        (format_perplexity(9.8712), "9.871"),
        (format_perplexity(92.634), "92.63"),
        (format_perplexity(106.52), "106.5"),
        (format_perplexity(1.2e7), "1.2e7"),
        (format_perplexity(float("inf")), "inf"),
    ],
)
def test_numbers_have_sensible_digits_and_units(written: str, expected: str) -> None:
    assert written == expected


def test_a_small_evaluation_is_one_table_with_its_ledger() -> None:
    text = render(evaluation_table(evaluation(["law", "code"], [], ["seed", "dense"])))
    head, *rows = [line.split() for line in text.splitlines() if line.strip()]
    assert head == ["model", "mean", "law", "code", "tokens", "FLOPs", "time"]
    assert rows[1] == ["seed", "80.50*", "80.00*", "81.00*", "3.28M", "95.0T", "7", "min", "20", "s"]
    assert rows[2][:4] == ["dense", "90.50", "90.00", "91.00"]


@pytest.mark.parametrize("width", [60, 80, 100, 200])
def test_twelve_domains_with_long_names_fit_the_width_and_lose_nothing(width: int) -> None:
    domains = [f"domain-number-{index:02d}" for index in range(12)]
    names = ["seed", "dense", *(f"elm/{domain}" for domain in domains), "random_split/ensemble"]
    example = evaluation(domains, ["kernel-documentation-and-lists"], names)
    text = render(evaluation_table(example), width)
    assert max(map(len, text.splitlines())) <= width
    for value in (score_.perplexity for model in example.models.values() for score_ in model.domains.values()):
        assert format_perplexity(value) in text
    assert "\u2026" not in text
    assert text.count("3.28M") == len(names)


def test_a_single_row_or_none_has_a_whole_heading() -> None:
    for names in (["seed"], []):
        assert render(evaluation_table(evaluation(["law"], [], names))).split()[:2] == ["model", "mean"]


def test_novel_domains_are_marked_and_left_out_of_the_mean() -> None:
    example = evaluation(["law"], ["poetry"], ["seed"])
    text = render(evaluation_table(example))
    assert "(novel)" in text
    assert (
        evaluation_json(example)["models"]["seed"]["mean_perplexity"]
        == example.models["seed"].domains["law"].perplexity
    )


def test_missing_figures_are_dashes() -> None:
    example = evaluation(["law", "code"], [], ["seed", "average/posterior"])
    del example.models["average/posterior"].domains["code"]
    row = next(line for line in render(evaluation_table(example)).splitlines() if "posterior" in line)
    assert row.split()[1:4] == ["-", "90.00", "-"]


def test_intervals_are_shown_on_demand() -> None:
    example = evaluation(["law"], [], ["seed"])
    assert "77.60-82.40" in render(evaluation_table(example, intervals=True))
    assert "77.60-82.40" not in render(evaluation_table(example))


def test_json_holds_the_same_figures_as_the_table() -> None:
    example = evaluation(["law", "code"], ["poetry"], ["seed", "dense"])
    values = evaluation_json(example)
    assert values["domains"] == ["law", "code"]
    assert values["models"]["dense"]["perplexity"] == {"law": 90.0, "code": 91.0, "poetry": 92.0}
    assert values["models"]["dense"]["ledger"] == {"tokens": 3_276_800, "flops": 9.5e13, "seconds": 440.0}


def test_pipes_get_no_control_characters_and_markup_is_not_read() -> None:
    example = evaluation(["law", HOSTILE], [HOSTILE + "2"], ["seed", HOSTILE])
    manifest = ForestManifest(
        name=HOSTILE,
        tokenizer_sha256="ab",
        vocab_size=9,
        seed=record("seed", []),
        elms=[record(HOSTILE, [Parent(name=HOSTILE, weight=0.6), Parent(name="law", weight=0.4)])],
    )
    tables = [
        evaluation_table(example),
        forest_table(manifest),
        elm_table(manifest.elms[0]),
        key_value_table({HOSTILE: HOSTILE}),
        rows_table([HOSTILE, "n"], [(HOSTILE, 3)], title=HOSTILE),
    ]
    for table in tables:
        for terminal in (False, True):
            text = render(table, force_terminal=terminal)
            assert "[31m[" not in text.replace("\\x1b[31m[", "")
            assert terminal or not CONTROL.search(text)
            assert "\u202e" not in text
            assert "[bold]" in re.sub(r"\s", "", text)


def test_the_forest_table_names_parents_with_weights() -> None:
    seed = [Parent(name="seed", weight=1.0)]
    mixture = [Parent(name="law", weight=0.25), Parent(name="code", weight=0.75)]
    manifest = ForestManifest(
        name="demo",
        tokenizer_sha256="ab",
        vocab_size=9,
        seed=record("seed", []),
        elms=[record("law", seed), record("code", seed), record("tax", mixture)],
    )
    lines = render(forest_table(manifest)).splitlines()
    tax = next(line for line in lines if line.strip().startswith("tax"))
    assert "code 0.75 + law 0.25" in tax
    assert tax.split()[-6:] == ["4.30M", "205K", "4.520", "trained", "2026-03-01", "12:00"]
    assert "3 ELMs" in lines[0]
