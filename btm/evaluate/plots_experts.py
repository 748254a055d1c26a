"""Plots of expert layers: their load and losses while they train, and which expert reads which domain."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from btm.evaluate.plots_curves import smoothed
from btm.evaluate.plots_style import GREY, INK, colours, dashes, new_figure, plot_style, short
from btm.tables import format_count

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

QUANTITIES = {
    "load": ("largest load", "largest / mean load"),
    "entropy": ("entropy of the load", "share of log E (1 = even)"),
    "dropped": ("dropped by full experts", "% of assignments"),
    "unrouted": ("tokens without an expert", "% of tokens"),
    "load_balance": ("load-balancing loss", "loss (1 = balanced)"),
    "z": ("router z-loss", "mean (log-sum-exp)\u00b2"),
    "auxiliary": ("loss of auxiliary routers", "nats per token and expert"),
    "auxiliary_accuracy": ("auxiliary routers that are right", "share of tokens and experts"),
    "depth_auxiliary": ("loss of auxiliary depth routers", "nats per token"),
    "depth_accuracy": ("auxiliary depth routers that are right", "share of tokens"),
}
"""Key in the metrics -> title and unit of its panel."""
SHARES = ("dropped", "unrouted")
"""Quantities that the metrics hold as shares and that are shown in per cent."""
_WIDTH_IN = 10.4
_PANELS_PER_ROW = 3
_MOST_POINTS = 300
_MOST_NAMED = 12
_MOST_NUMBERED = 16
_CELL_IN = (0.42, 0.3)
_NARROW_CELL_IN = 0.055
_LABELS_IN, _BAR_IN = 1.7, 1.1
_LOWEST_IN = 2.9
"""Below this the colour bar has no room for its label."""


@dataclass(frozen=True, slots=True)
class LayerSeries:
    """One quantity of one expert layer over training."""

    block: int
    """Number of the transformer block, from 0."""
    tokens: Sequence[float]
    """Tokens that the model had read; rising."""
    values: Sequence[float]


@dataclass(frozen=True, slots=True)
class DomainShares:
    """Where the tokens of each domain, or of each class, went in one layer."""

    block: int
    domains: Sequence[str]
    """Names of the domains or classes."""
    shares: np.ndarray
    """``(domains, E)``: share of the domain's assignments that went to each expert; rows sum to 1, or to 0 where the
    layer read none of its tokens."""


def expert_curves(series: Mapping[str, Sequence[LayerSeries]]) -> "Figure | None":
    """One panel per quantity over the tokens read, one line per layer.

    Args:
        series: Key of :data:`QUANTITIES` -> its layers; others are left out.

    Returns:
        The figure; None when there is nothing to show.
    """
    panels = {what: [one for one in series.get(what, ()) if len(one.tokens)] for what in QUANTITIES}
    panels = {what: found for what, found in panels.items() if found}
    if not panels:
        return None
    blocks = sorted({one.block for found in panels.values() for one in found})
    columns = 2 if len(panels) == 4 else min(_PANELS_PER_ROW, len(panels))
    rows = math.ceil(len(panels) / columns)
    with plot_style():
        figure = new_figure(min(_WIDTH_IN, 2.2 + 3.4 * columns), 0.9 + 2.3 * rows)
        grid = figure.subplots(rows, columns, squeeze=False)
        ink, handles = _inks(blocks), {}
        for axes, (what, found) in zip(grid.flat, panels.items(), strict=False):
            for one in found:
                handles[one.block] = _draw(axes, one, 100.0 if what in SHARES else 1.0, ink[one.block])
            _finish(axes, what)
        for axes in list(grid.flat)[len(panels) :]:
            axes.set_visible(False)
        figure.supxlabel("tokens read", fontsize=9.5)
        if len(blocks) <= _MOST_NAMED:
            lines = [handles[block] for block in blocks]
            figure.legend(lines, [f"block {b}" for b in blocks], loc="outside upper right", ncols=6)
        else:
            _depth_bar(figure, grid, blocks)
    return figure


def domain_expert_maps(
    layers: Sequence[DomainShares], experts: Sequence[str], expert_axis: str, *, rows_are: str = "domain"
) -> "Figure | None":
    """Heat maps with one scale of colour: rows domains, columns experts, a panel per layer.

    Args:
        layers: Layers to show.
        experts: Names of the experts for the axis; numbers from 0 in layers with another number of them.
        expert_axis: What the experts' axis is called.
        rows_are: What a row stands for.

    Returns:
        The figure; None when there is nothing to show.
    """
    layers = [layer for layer in layers if layer.shares.size]
    if not layers:
        return None
    widest, tallest = max(layer.shares.shape[1] for layer in layers), max(len(layer.domains) for layer in layers)
    numbered = widest <= _MOST_NUMBERED
    panel = max(1.6, widest * (_CELL_IN[0] if numbered else _NARROW_CELL_IN)) + 0.25
    columns = max(1, min(len(layers), int((_WIDTH_IN - _LABELS_IN - _BAR_IN) / panel)))
    rows = math.ceil(len(layers) / columns)
    top = max(0.01, *(float(layer.shares.max()) for layer in layers)) * 100
    with plot_style():
        width = min(_WIDTH_IN, _LABELS_IN + _BAR_IN + panel * columns)
        figure = new_figure(width, max(_LOWEST_IN, 1.1 + rows * (0.5 + _CELL_IN[1] * tallest)))
        grid = figure.subplots(rows, columns, squeeze=False)
        meshes = []
        for place, (axes, layer) in enumerate(zip(grid.flat, layers, strict=False)):
            names = experts if len(experts) == layer.shares.shape[1] else [str(i) for i in range(layer.shares.shape[1])]
            meshes.append(_map(axes, layer, names, top, numbered=numbered))
            if place % columns and layer.domains == layers[place - 1].domains:
                axes.set_yticklabels([])
            if place + columns < len(layers) and layers[place + columns].shares.shape[1] == len(names):
                axes.set_xticklabels([])
        for axes in list(grid.flat)[len(layers) :]:
            axes.set_visible(False)
        figure.supxlabel(expert_axis, fontsize=9.5)
        bar = figure.colorbar(meshes[0], ax=grid, pad=0.02, aspect=18 * rows, shrink=0.9)
        bar.set_label(f"% of the {rows_are}'s tokens")
        bar.outline.set_visible(False)
        if bar.solids is not None:
            bar.solids.set(rasterized=False, edgecolor="face")
    return figure


def _inks(blocks: Sequence[int]) -> dict[int, tuple[Any, str]]:
    """Colour and dash of each block: told apart by hue where they are named, ordered by depth where they are many."""
    if len(blocks) <= _MOST_NAMED:
        names = [str(block) for block in blocks]
        colour, dash = colours(names), dashes(names)
        return {block: (colour[str(block)], dash[str(block)]) for block in blocks}
    from matplotlib import colormaps

    shades = colormaps["viridis_r"](np.linspace(0.05, 1, len(blocks)))
    return {block: (shade, "-") for block, shade in zip(blocks, shades, strict=True)}


def _depth_bar(figure: "Figure", grid: Any, blocks: Sequence[int]) -> None:
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import ListedColormap, Normalize

    shades = ListedColormap([ink for ink, _ in _inks(blocks).values()])
    bar = figure.colorbar(ScalarMappable(Normalize(blocks[0], blocks[-1]), shades), ax=grid, pad=0.02, aspect=30)
    bar.set_label("block, from the input upwards")
    bar.outline.set_visible(False)
    if bar.solids is not None:
        bar.solids.set(rasterized=False, edgecolor="face")


def _draw(axes: "Axes", one: LayerSeries, factor: float, ink: tuple[Any, str]) -> Any:
    tokens, smooth = np.asarray(one.tokens), smoothed(one.values) * factor
    kept = np.unique(np.linspace(0, len(tokens) - 1, min(len(tokens), _MOST_POINTS)).round().astype(int))
    marker = "o" if len(tokens) < 12 else None
    (line,) = axes.plot(
        tokens[kept], smooth[kept], color=ink[0], linestyle=ink[1], linewidth=1.4, marker=marker, markersize=3
    )
    return line


def _finish(axes: "Axes", what: str) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    title, unit = QUANTITIES[what]
    axes.set_title(title, loc="left", fontsize=9.5)
    axes.set_ylabel(unit)
    axes.grid()
    axes.set_axisbelow(True)
    axes.margins(y=0.12)
    axes.ticklabel_format(axis="y", useOffset=False)
    axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: format_count(value)))


def _map(axes: "Axes", layer: DomainShares, experts: Sequence[str], top: float, *, numbered: bool) -> Any:
    values = layer.shares * 100
    rows, columns = values.shape
    # Not imshow: it embeds a picture, which viewers blur when the page is enlarged.
    edges = np.arange(columns + 1) - 0.5, np.arange(rows + 1) - 0.5
    mesh = axes.pcolormesh(*edges, values, cmap="Blues", vmin=0, vmax=top)
    axes.set_ylim(rows - 0.5, -0.5)
    if numbered:
        for (row, column), value in np.ndenumerate(values):
            text = f"{value:.0f}" if value >= 1 or not value else "<1"
            colour = "white" if value > 0.55 * top else INK if value else GREY
            axes.text(column, row, text, ha="center", va="center", fontsize=8, color=colour)
    every = max(1, round(columns / 16)) if not numbered else 1
    names = [short(experts[place], 18) for place in range(0, columns, every)]
    tilt: dict[str, Any] = {"rotation": 35, "ha": "right", "rotation_mode": "anchor"}
    axes.set_xticks(range(0, columns, every), names, **(tilt if max(map(len, names)) > 3 else {}))
    axes.set_yticks(range(rows), [short(domain, 24) for domain in layer.domains])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_title(f"block {layer.block}", loc="left", fontsize=9.5)
    return mesh
