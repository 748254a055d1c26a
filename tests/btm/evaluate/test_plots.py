import io
import xml.etree.ElementTree
from base64 import b64decode

import matplotlib
import numpy as np
import pytest
from example_forest import EIGHT, NOVEL, _manifest, example_evaluation, score
from matplotlib.image import imread

from btm.evaluate.plots import domain_bars, ledger_bars, perplexity_matrix, prior_matrix
from btm.evaluate.plots_curves import Curve, dev_curves, loss_curves, smoothed
from btm.evaluate.plots_lineage import layout, lineage_plot
from btm.evaluate.plots_posterior import posterior_plot, token_label
from btm.evaluate.plots_style import colours, dashes, png_bytes, short, svg_data_uri
from btm.records import Ledger, PosteriorTrace
from btm.tables import format_perplexity

TWELVE = [f"domain-with-a-long-name-{index:02d}" for index in range(12)]


def texts(figure) -> list[str]:
    """Every text of the written SVG; fails when it is not well-formed."""
    content = b64decode(svg_data_uri(figure).removeprefix("data:image/svg+xml;base64,"))
    root = xml.etree.ElementTree.fromstring(content)
    return ["".join(element.itertext()).strip() for element in root.iter("{http://www.w3.org/2000/svg}text")]


def assert_whole(figure) -> None:
    """Nothing reaches the edge of the picture, so nothing is cut off."""
    pixels = imread(io.BytesIO(png_bytes(figure, dots_per_inch=60)))[..., :3]
    for edge in (pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]):
        assert (edge == 1).all()
    assert (pixels < 0.9).any()


def curve(name: str, begin: float = 0, count: int = 40) -> Curve:
    return Curve(name, [begin + 1000 * index for index in range(count)], [5 - index / count for index in range(count)])


@pytest.mark.parametrize("domains", [["law", "code"], EIGHT, TWELVE], ids=len)
def test_evaluation_plots_show_every_name_and_number(domains: list[str]) -> None:
    evaluation = example_evaluation(domains, NOVEL)
    matrix = perplexity_matrix(evaluation)
    written = texts(matrix)
    for name, scores in evaluation.models.items():
        assert short(name, 36) in written
        for domain in domains:
            assert short(domain) in written
            assert format_perplexity(scores.domains[domain].perplexity) in written
    assert "perplexity / best of the domain (log scale)" in written
    assert "perl-docs (novel)" in written
    bars = domain_bars(evaluation, "ensemble/uniform")
    written = texts(bars)
    assert "ensemble, uniform prior" in written
    assert any("perplexity per token" in text and "95 %" in text for text in written)
    ledger = ledger_bars({name: scores.ledger for name, scores in evaluation.models.items() if scores.ledger})
    for figure in (matrix, bars, ledger, prior_matrix(evaluation)):
        assert_whole(figure)


def test_the_matrix_frames_the_best_elm_and_the_best_other_model_of_each_domain() -> None:
    evaluation = example_evaluation(["law", "code"], [])
    axes = perplexity_matrix(evaluation).axes[0]
    framed = sorted((round(box.get_y() + 0.45), round(box.get_x() + 0.47)) for box in axes.patches)
    rows = [label.get_text() for label in axes.get_yticklabels()]
    assert [(rows[row], column) for row, column in framed] == [
        ("elm/law", 0),
        ("elm/code", 1),
        ("ensemble/updating", 0),
        ("ensemble/updating", 1),
    ]


def test_intervals_are_drawn_at_their_place() -> None:
    evaluation = example_evaluation(["law"], [], factor={"seed": 1.0})
    evaluation.models["seed"].domains["law"] = score(100, spread=0.2)
    axes = domain_bars(evaluation, "ensemble/uniform").axes[0]
    whisker = axes.containers[0].get_children()[0]
    (segment,) = whisker.get_segments()
    assert segment[:, 0] == pytest.approx([80, 120])


def test_a_wide_range_goes_to_a_log_axis_that_holds_every_point() -> None:
    evaluation = example_evaluation(["law", "code"], [], factor={"average/uniform": 900.0})
    figure = domain_bars(evaluation, "ensemble/uniform")
    assert figure.axes[0].get_xscale() == "log"
    assert any("log scale" in text for text in texts(figure))
    assert_whole(figure)


def test_missing_cells_and_rows_are_left_out() -> None:
    evaluation = example_evaluation(["law", "code"], [])
    del evaluation.models["dense"].domains["code"]
    for name in ("random_split/ensemble", "average/posterior", "average/uniform"):
        del evaluation.models[name]
    assert "-" in texts(perplexity_matrix(evaluation))
    assert "random-split ensemble" not in texts(domain_bars(evaluation, "ensemble/uniform"))
    evaluation.models.clear()
    assert domain_bars(evaluation, "ensemble/uniform") is None
    assert prior_matrix(evaluation.model_copy(update={"cached_priors": {}})) is None
    assert ledger_bars({}) is None


def test_a_ledger_separates_the_seed_phase() -> None:
    ledgers = {"seed": Ledger(tokens=10, flops=1e9, seconds=5), "elm/law": Ledger(tokens=14, flops=1.4e9, seconds=9)}
    figure = ledger_bars(ledgers)
    shared, own = figure.axes[0].containers
    assert [bar.get_width() for bar in shared] == [10, 10]
    assert [bar.get_width() for bar in own] == [0, 4]
    assert {"training tokens", "training FLOPs", "1.00G", "9.0 s"} <= set(texts(figure))


def test_loss_curves_show_all_runs_and_enlarge_the_branches() -> None:
    runs = [curve("seed"), curve("dense", 40_000), *(curve(f"elm/{name}", 40_000, 10) for name in TWELVE)]
    runs += [curve(f"random/{index}", 40_000, 10) for index in range(12)]
    figure = loss_curves([*runs, Curve("elm/not-begun", [], [])])
    written = texts(figure)
    assert {"seed", "dense", "random split (12)", *(short(f"elm/{name}") for name in TWELVE)} <= set(written)
    assert "elm/not-begun" not in written
    assert "training loss in nats per token" in written
    assert figure.axes[1].get_xlim()[0] > 30_000
    assert_whole(figure)
    assert loss_curves([Curve("seed", [], [])]) is None
    assert texts(loss_curves([curve("seed", count=1)])).count("the branches, enlarged") == 0


def test_many_points_stay_a_small_file() -> None:
    assert len(svg_data_uri(loss_curves([curve(f"elm/{index}", count=20_000) for index in range(8)]))) < 400_000


def test_dev_curves_have_a_panel_per_domain() -> None:
    found = {name: [curve("seed"), curve("dense", 40_000), curve(f"elm/{name}", 40_000)] for name in TWELVE[:5]}
    figure = dev_curves({**found, "empty": [Curve("seed", [], [])]})
    written = texts(figure)
    assert {"own ELM", "seed", "dense", "dev loss in nats per token", *(short(n, 26) for n in TWELVE[:5])} <= set(
        written
    )
    assert_whole(figure)
    assert dev_curves({}) is None


def test_smoothing_keeps_constants_and_lies_between_the_extremes() -> None:
    assert smoothed([2.0] * 100) == pytest.approx([2.0] * 100)
    values = np.random.default_rng(0).normal(size=500).tolist()
    smooth = smoothed(values)
    assert smooth[0] == values[0]
    assert np.std(smooth[100:]) < 0.5 * np.std(values)
    assert len(smoothed([])) == 0


def test_the_posterior_plot_stacks_to_one_and_names_tokens() -> None:
    evaluation = example_evaluation(EIGHT, [])
    figure = posterior_plot(evaluation.traces[0])
    top = figure.axes[0].collections[-1].get_paths()[0].vertices[:, 1]
    assert top.max() == pytest.approx(1)
    written = texts(figure)
    assert {"posterior weight", "</script>", "\u21b5", *EIGHT} <= set(written)
    assert any("240 tokens" in text for text in written)
    assert_whole(figure)
    assert posterior_plot(PosteriorTrace(domain="law", elms=["law"], tokens=[], weights=[])) is None
    one = PosteriorTrace(domain="law", elms=["law"], tokens=["a"], weights=[[1.0]])
    assert_whole(posterior_plot(one))


@pytest.mark.parametrize(
    ("token", "label"),
    [
        (" the", "\u2423the"),
        ("\n\t", "\u21b5\u21e5"),
        ("\x1b[0m", "\\x1b[0m"),
        ("", ""),
        ("a" * 40, "a" * 13 + "\u2026"),
    ],
)
def test_token_labels_are_short_and_visible(token: str, label: str) -> None:
    assert token_label(token) == label


def test_the_lineage_puts_parents_left_of_their_children_and_writes_weights() -> None:
    manifest = _manifest(EIGHT[:-1], EIGHT[-1])
    places = layout(manifest)
    for record in manifest.elms:
        for parent in record.parents:
            assert places[parent.name][0] < places[record.domain][0]
    assert len(set(places.values())) == len(places)
    figure = lineage_plot(manifest)
    assert {"seed", "0.50", "0.25", "205K tokens", *EIGHT} <= set(texts(figure))
    assert_whole(figure)
    assert_whole(lineage_plot(_manifest(TWELVE, "y" * 64)))
    assert lineage_plot(manifest.model_copy(update={"elms": []})) is None


def test_the_lineage_of_an_orphan_is_drawn() -> None:
    """A parent may have been removed from the forest since."""
    manifest = _manifest(["law", "code"], "tax")
    orphan = manifest.model_copy(update={"seed": None, "elms": manifest.elms[1:]})
    assert {"code", "tax"} <= set(texts(lineage_plot(orphan)))


def test_names_are_never_read_as_mathematics_or_markup() -> None:
    names = ["$x^$", "a_b$\\frac{", "<script>alert(1)</script>", "\x1b[31m&amp;"]
    evaluation = example_evaluation(names, [])
    for figure in (
        perplexity_matrix(evaluation),
        domain_bars(evaluation, "ensemble/uniform"),
        prior_matrix(evaluation),
    ):
        written = "\n".join(texts(figure))
        assert "$x^$" in written
        assert "<script>alert(1)</script>" in written
        assert "\\x1b[31m" in written
    assert "$x^$" in texts(lineage_plot(_manifest(names, None)))


def test_plots_leave_no_trace_in_the_process() -> None:
    before = dict(matplotlib.rcParams)
    svg_data_uri(perplexity_matrix(example_evaluation(["law"], [])))
    assert dict(matplotlib.rcParams) == before


def test_colours_and_dashes_tell_forty_elms_apart() -> None:
    names = [str(index) for index in range(40)]
    assert len({(colours(names)[name], dashes(names)[name]) for name in names}) == 40


def test_the_same_figures_give_the_same_file() -> None:
    evaluation = example_evaluation(["law", "code"], [])
    assert svg_data_uri(perplexity_matrix(evaluation)) == svg_data_uri(perplexity_matrix(evaluation))
