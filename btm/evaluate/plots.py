"""Plots of an evaluation: perplexity matrix, comparison by domain with intervals, cached priors, ledger."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from btm.evaluate.plots_style import GREY, INK, LIGHT_GREY, SPARSE, new_figure, plot_style, short
from btm.records import Evaluation, Ledger
from btm.tables import domain_label, format_count, format_duration, format_flops, format_perplexity

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_CELL_IN = (0.72, 0.31)
_NARROWEST_IN = 2.9
_BAR_IN = 0.14
_LOG_FROM = 12.0
"""Largest perplexity divided by the smallest from which bars give way to points on a log axis."""
_COMPARED = {
    "seed": ("#bbbbbb", "seed"),
    "random_split/ensemble": ("#ddaa33", "random-split ensemble"),
    "average/uniform": ("#bb5566", "uniform average"),
    "average/posterior": ("#66ccee", "posterior average"),
    "dense": ("#222222", "dense"),
    "sparse": (SPARSE, "sparse"),
    "ensemble": ("#4477aa", "ensemble"),
}


def perplexity_matrix(evaluation: Evaluation) -> "Figure":
    """Heat map: rows models, columns domains; numbers are perplexities, colour is the distance to the column's best.

    The colour scale is logarithmic and readable without colour vision; for each domain the best ELM and the best of
    the other models are framed.
    """
    names = sorted(evaluation.models, key=lambda name: not name.startswith("elm/"))
    domains = [*evaluation.domains, *evaluation.novel_domains]
    values = np.array([[_perplexity(evaluation, name, domain) for domain in domains] for name in names], dtype=float)
    with plot_style():
        from matplotlib.colors import LogNorm

        width = 3.6 + max(_CELL_IN[0] * len(domains), _NARROWEST_IN)
        height = 1.7 + _CELL_IN[1] * len(names)
        figure = new_figure(width, height)
        axes: Axes = figure.subplots()
        ratios = values / _column_minimum(values)
        top = max(1.5, float(np.nanmax(ratios, initial=1.5)))
        image = _cells(axes, ratios, cmap="cividis_r", norm=LogNorm(1, top))
        num_elms = sum(name.startswith("elm/") for name in names)
        best = np.concatenate([block == _column_minimum(block) for block in (values[:num_elms], values[num_elms:])])
        _annotate(axes, values, best, image.to_rgba(ratios))
        labels = [short(domain_label(evaluation, domain), 34) for domain in domains]
        axes.set_xticks(range(len(domains)), labels, rotation=35, ha="right", rotation_mode="anchor")
        axes.set_yticks(range(len(names)), [short(name, 36) for name in names])
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        _separate(axes, rows=num_elms, columns=len(evaluation.domains))
        axes.set_xlabel("domain of the test documents")
        bar = figure.colorbar(image, ax=axes, pad=0.1 / width, fraction=0.3 / width, aspect=3.6 * height)
        bar.set_label("perplexity / best of the domain (log scale)")
        _plain_log_ticks(bar.ax.yaxis, [1, 1.2, 1.5, 2, 3, 5, 10, 20, 50, 100], top)
        bar.outline.set_visible(False)
        if bar.solids is not None:
            bar.solids.set(rasterized=False, edgecolor="face")
    return figure


def domain_bars(evaluation: Evaluation, ensemble: str) -> "Figure | None":
    """Perplexity by domain of seed, dense, sparse, averages and ensembles with 95 % bootstrap intervals.

    Args:
        evaluation: What was measured.
        ensemble: Row of the ensemble to show (``ensemble/uniform``).

    Returns:
        The figure; None when none of the rows was measured.
    """
    rows = {("ensemble" if name == ensemble else name): name for name in evaluation.models}
    shown = [(rows[key], *style) for key, style in _COMPARED.items() if key in rows]
    domains = [*evaluation.domains, *evaluation.novel_domains]
    if not shown or not domains:
        return None
    with plot_style():
        figure = new_figure(10.4, 1.1 + len(domains) * (_BAR_IN * len(shown) + 0.16))
        axes: Axes = figure.subplots()
        values = [s.perplexity for name, _, _ in shown for s in evaluation.models[name].domains.values()]
        logarithmic = bool(values) and max(values) / min(values) > _LOG_FROM
        for index, (name, colour, label) in enumerate(shown):
            label = evaluation_label(name, label)
            _bars(axes, evaluation, domains, (name, colour, label), (index, len(shown)), points=logarithmic)
        labels = [short(domain_label(evaluation, domain), 34).replace(" (", "\n(") for domain in domains]
        axes.set_yticks(range(len(domains)), labels)
        axes.set_ylim(len(domains) - 0.45, -0.55)
        axes.grid(axis="x")
        axes.set_axisbelow(True)
        axes.tick_params(axis="y", length=0)
        if logarithmic:
            axes.set_xscale("log")
            low, high = axes.get_xlim()
            _plain_log_ticks(axes.xaxis, _nice_ticks(low, high), high)
            axes.set_xlim(low, high)
        scale = " (log scale)" if logarithmic else ""
        axes.set_xlabel(f"test perplexity per token{scale}, lower is better; whiskers: 95 % bootstrap interval")
        axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1), handlelength=1.2)
    return figure


def prior_matrix(evaluation: Evaluation) -> "Figure | None":
    """Cached priors: one row per domain, one column per ELM, weights that sum to 1; None when there are none."""
    priors = evaluation.cached_priors
    elms = list(dict.fromkeys(elm for weights in priors.values() for elm in weights))
    if not elms:
        return None
    values = np.array([[weights.get(elm, 0.0) for elm in elms] for weights in priors.values()])
    with plot_style():
        figure = new_figure(3.6 + 0.62 * len(elms), 1.6 + 0.29 * len(priors))
        axes: Axes = figure.subplots()
        _cells(axes, values, cmap="Blues", vmin=0, vmax=1)
        for (row, column), value in np.ndenumerate(values):
            colour = "white" if value > 0.55 else INK
            axes.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=8.5, color=colour)
        axes.set_xticks(range(len(elms)), [short(elm) for elm in elms], rotation=35, ha="right", rotation_mode="anchor")
        axes.set_yticks(range(len(priors)), [short(domain) for domain in priors])
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        axes.set_xlabel("model of the domain" if "sparse" in evaluation.models else "ELM")
        axes.set_ylabel("target domain")
    return figure


def ledger_bars(ledgers: dict[str, Ledger]) -> "Figure | None":
    """Tokens, FLOPs and time of every model, the seed phase in them marked; None when there is no ledger."""
    if not ledgers:
        return None
    panels: list[tuple[str, Callable[[Ledger], float], Callable[[float], str]]] = [
        ("training tokens", lambda ledger: float(ledger.tokens), format_count),
        ("training FLOPs", lambda ledger: ledger.flops, format_flops),
        ("training time, summed", lambda ledger: ledger.seconds, format_duration),
    ]
    with plot_style():
        figure = new_figure(10.4, 1.0 + 0.25 * len(ledgers))
        for axes, (title, quantity, form) in zip(figure.subplots(1, 3, sharey=True), panels, strict=True):
            _ledger_panel(axes, ledgers, quantity, form)
            axes.set_title(title, loc="left")
        first = figure.axes[0]
        first.set_yticks(range(len(ledgers)), [short(name, 36) for name in ledgers])
        first.set_ylim(len(ledgers) - 0.5, -0.5)
        if "seed" in ledgers:
            figure.legend(*first.get_legend_handles_labels(), loc="outside lower left", ncols=2)
    return figure


def evaluation_label(name: str, label: str) -> str:
    """Label of a compared row; the ensemble's says which prior it has."""
    return f"ensemble, {name.split('/', 1)[1]} prior" if name.startswith("ensemble/") else label


def _perplexity(evaluation: Evaluation, name: str, domain: str) -> float:
    score = evaluation.models[name].domains.get(domain)
    return float("nan") if score is None else score.perplexity


def _column_minimum(values: np.ndarray) -> np.ndarray:
    return np.where(np.isnan(values), np.inf, values).min(axis=0, initial=np.inf, keepdims=True)


def _cells(axes: "Axes", values: np.ndarray, **colours: Any) -> Any:
    # Not imshow: it embeds a picture, which viewers blur when the page is enlarged.
    rows, columns = values.shape
    mesh = axes.pcolormesh(np.arange(columns + 1) - 0.5, np.arange(rows + 1) - 0.5, values, **colours)
    axes.set_ylim(rows - 0.5, -0.5)
    return mesh


def _annotate(axes: "Axes", values: np.ndarray, best: np.ndarray, background: np.ndarray) -> None:
    from matplotlib.patches import Rectangle

    for (row, column), value in np.ndenumerate(values):
        if np.isnan(value):
            axes.text(column, row, "-", ha="center", va="center", color=GREY)
            continue
        red, green, blue = background[row, column, :3]
        dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.5
        axes.text(
            column,
            row,
            format_perplexity(value),
            ha="center",
            va="center",
            fontsize=8.5,
            fontweight="bold" if best[row, column] else "normal",
            color="white" if dark else INK,
        )
        if best[row, column]:
            box = Rectangle((column - 0.47, row - 0.45), 0.94, 0.9, fill=False, edgecolor=INK, linewidth=1.5)
            axes.add_patch(box)


def _separate(axes: "Axes", *, rows: int, columns: int) -> None:
    for line in (axes.axhline, rows), (axes.axvline, columns):
        draw, position = line
        if position:
            draw(position - 0.5, color="white", linewidth=4)


def _bars(
    axes: "Axes",
    evaluation: Evaluation,
    domains: Sequence[str],
    row: tuple[str, str, str],
    place: tuple[int, int],
    *,
    points: bool,
) -> None:
    name, colour, label = row
    index, count = place
    height = 0.86 / count
    scores = evaluation.models[name].domains
    present = [(position, scores[domain]) for position, domain in enumerate(domains) if domain in scores]
    if not present:
        return
    y = [position + (index - (count - 1) / 2) * height for position, _ in present]
    x = [score.perplexity for _, score in present]
    whiskers = [
        [max(0.0, score.perplexity - score.low) for _, score in present],
        [max(0.0, score.high - score.perplexity) for _, score in present],
    ]
    style: dict[str, Any] = {"xerr": whiskers, "label": label}
    if points:
        axes.errorbar(x, y, fmt="o", markersize=4.5, color=colour, elinewidth=1.1, capsize=1.5, **style)
    else:
        axes.barh(y, x, height * 0.92, color=colour, error_kw={"elinewidth": 1, "ecolor": "#666666"}, **style)


def _ledger_panel(
    axes: "Axes", ledgers: dict[str, Ledger], quantity: Callable[[Ledger], float], form: Callable[[float], str]
) -> None:
    shared = quantity(ledgers["seed"]) if "seed" in ledgers else 0.0
    values = [quantity(ledger) for ledger in ledgers.values()]
    seed_part = [shared if value >= shared else 0.0 for value in values]
    own = [
        0.0 if name == "seed" else value - part for name, value, part in zip(ledgers, values, seed_part, strict=True)
    ]
    axes.barh(range(len(values)), seed_part, 0.7, color=LIGHT_GREY, label="seed phase")
    axes.barh(range(len(values)), own, 0.7, left=seed_part, color="#4477aa", label="after the branch")
    longest = max(values, default=0.0) or 1.0
    for position, value in enumerate(values):
        axes.text(value + longest * 0.02, position, form(value), va="center", fontsize=8.5)
    axes.set_xlim(0, longest * 1.42)
    axes.set_xticks([])
    axes.tick_params(axis="y", length=0)
    axes.spines[["bottom", "left"]].set_visible(False)


def _plain_log_ticks(axis: Any, ticks: Sequence[float], top: float) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    axis.set_major_locator(FixedLocator([tick for tick in ticks if tick <= top * 1.001]))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_locator(NullLocator())


def _nice_ticks(low: float, high: float) -> list[float]:
    powers = range(int(np.floor(np.log10(low))), int(np.ceil(np.log10(high))) + 1)
    return [digit * 10.0**power for power in powers for digit in (1, 2, 5) if low <= digit * 10.0**power <= high]
