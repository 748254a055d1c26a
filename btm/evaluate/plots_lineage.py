"""Plot of a forest's lineage: the seed, the ELMs that branched from it, and those that were added later."""

from typing import TYPE_CHECKING

from btm.evaluate.plots_style import GREY, INK, new_figure, plot_style, short
from btm.records import ElmRecord, ForestManifest
from btm.tables import format_count

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_ROW_IN = 0.46
_BOX = (0.62, 0.66)
"""Width and height of a box, in columns and rows."""
_SMALLEST_LABEL = 0.005

Places = dict[str, tuple[float, float]]


def lineage_plot(manifest: ForestManifest) -> "Figure | None":
    """Graph of all models, parents to the left; lines carry the weights of a branch from a mixture.

    Returns:
        The figure; None for a forest without ELMs.
    """
    if not manifest.elms:
        return None
    places = layout(manifest)
    columns = 1 + max(column for column, _ in places.values())
    rows = 1 + max(row for _, row in places.values())
    later = {record.domain for record in manifest.elms if is_later(record)}
    with plot_style():
        figure = new_figure(min(10.4, 1.0 + 3.3 * columns), 0.5 + _ROW_IN * max(rows, 2.0))
        axes: Axes = figure.subplots()
        for record in manifest.elms:
            _draw_parents(axes, record, places, manifest)
        if manifest.seed:
            _draw_box(axes, places["seed"], "seed", manifest.seed, "#eeeeee")
        for record in manifest.elms:
            fill = "#fdeecb" if record.domain in later else "#dce9f5"
            _draw_box(axes, places[record.domain], record.domain, record, fill)
        axes.set_xlim(-_BOX[0] / 2 - 0.05, columns - 1 + _BOX[0] / 2 + 0.05)
        axes.set_ylim(rows - 0.4, -0.6)
        axes.axis("off")
        _legend(figure, later=bool(later), imported=any(record.origin == "imported" for record in manifest.elms))
    return figure


def is_later(record: ElmRecord) -> bool:
    """Whether an ELM was branched from other ELMs, so that it joined after them."""
    return any(parent.name != "seed" for parent in record.parents)


def layout(manifest: ForestManifest) -> Places:
    """Column (generation) and row of every model; each column is centred, in manifest order."""
    generation = {"seed": 0}
    for record in manifest.elms:
        parents = [generation.get(parent.name, 0) for parent in record.parents]
        generation[record.domain] = 1 + max(parents, default=0)
    columns: dict[int, list[str]] = {}
    for name, column in generation.items():
        columns.setdefault(column, []).append(name)
    tallest = max(len(names) for names in columns.values())
    return {
        name: (float(column), index + (tallest - len(names)) / 2)
        for column, names in columns.items()
        for index, name in enumerate(names)
    }


def _draw_box(axes: "Axes", place: tuple[float, float], name: str, record: ElmRecord, fill: str) -> None:
    from matplotlib.patches import FancyBboxPatch

    x, y = place
    width, height = _BOX
    edge = "--" if record.origin == "imported" else "-"
    box = FancyBboxPatch(
        (x - width / 2, y - height / 2),
        width,
        height,
        boxstyle="round,pad=0,rounding_size=0.04",
        mutation_aspect=3,
        facecolor=fill,
        edgecolor=INK,
        linewidth=1,
        linestyle=edge,
        zorder=3,
    )
    axes.add_patch(box)
    text = f"{format_count(record.ledger.tokens)} tokens"
    axes.text(x, y - 0.14, short(name, 26), ha="center", va="center", fontweight="bold", fontsize=8.5, zorder=4)
    axes.text(x, y + 0.16, text, ha="center", va="center", fontsize=7.5, color="#555555", zorder=4)


def _draw_parents(axes: "Axes", record: ElmRecord, places: Places, manifest: ForestManifest) -> None:
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path

    end_x, end_y = places[record.domain][0] - _BOX[0] / 2, places[record.domain][1]
    mixed = [other.domain for other in manifest.elms if is_later(other)]
    for parent in record.parents:
        if parent.name not in places:
            continue
        start_x, start_y = places[parent.name][0] + _BOX[0] / 2, places[parent.name][1]
        bend = (end_x - start_x) / 2
        points = [(start_x, start_y), (start_x + bend, start_y), (end_x - bend, end_y), (end_x, end_y)]
        path = Path(points, [Path.MOVETO, Path.CURVE4, Path.CURVE4, Path.CURVE4])
        axes.add_patch(
            PathPatch(path, fill=False, edgecolor=GREY, linewidth=0.6 + 2.6 * parent.weight, alpha=0.85, zorder=1)
        )
        if parent.weight < 1 and parent.weight >= _SMALLEST_LABEL:
            # Children of one parent take turns along the line, so that their labels do not meet.
            turn = mixed.index(record.domain) % 3 if record.domain in mixed else 0
            x, y = _bezier(points, 0.1 + 0.12 * turn)
            box = {"facecolor": "white", "edgecolor": "none", "pad": 0.8}
            axes.text(x, y, f"{parent.weight:.2f}", ha="center", va="center", fontsize=7.5, bbox=box, zorder=2)


def _bezier(points: list[tuple[float, float]], t: float) -> tuple[float, float]:
    factors = ((1 - t) ** 3, 3 * t * (1 - t) ** 2, 3 * t**2 * (1 - t), t**3)
    x = sum(factor * point[0] for factor, point in zip(factors, points, strict=True))
    y = sum(factor * point[1] for factor, point in zip(factors, points, strict=True))
    return x, y


def _legend(figure: "Figure", *, later: bool, imported: bool) -> None:
    from matplotlib.patches import Patch

    handles = [Patch(facecolor="#eeeeee", edgecolor=INK, label="seed model")]
    handles.append(Patch(facecolor="#dce9f5", edgecolor=INK, label="ELM branched from the seed"))
    if later:
        label = "ELM added later, branched from ELMs with the weights on the lines"
        handles.append(Patch(facecolor="#fdeecb", edgecolor=INK, label=label))
    if imported:
        handles.append(Patch(facecolor="white", edgecolor=INK, linestyle="--", label="imported"))
    figure.legend(handles=handles, loc="outside lower left", ncols=2 if later else 3)
