"""Plots of training: loss over tokens of the seed, the branches that continue from it and the dense model."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from btm.evaluate.plots_style import GREY, INK, LIGHT_GREY, SPARSE, colours, dashes, new_figure, plot_style, short
from btm.tables import format_count

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MOST_POINTS = 400
_SMOOTHING_SHARE = 1 / 25
_PANELS_PER_ROW = 4
_DEV_LINES = {"seed": (GREY, "seed"), "sparse": (SPARSE, "sparse"), "dense": (INK, "dense")}


@dataclass(frozen=True, slots=True)
class Curve:
    """Loss of one run."""

    name: str
    """``seed``, ``sparse``, ``dense``, ``elm/<domain>`` or ``random/<index>``."""
    tokens: Sequence[float]
    """Tokens that the model had read, its ancestors' included; rising."""
    losses: Sequence[float]
    """Nats per token."""

    @property
    def kind(self) -> str:
        """``seed``, ``sparse``, ``dense``, ``elm`` or ``random``."""
        return self.name.split("/", 1)[0]


def loss_curves(curves: Sequence[Curve]) -> "Figure | None":
    """Training loss of all models over tokens: smoothed, the raw values behind; the branches enlarged beside it.

    Returns:
        The figure; None when there is nothing to show.
    """
    curves = [curve for curve in curves if len(curve.tokens) > 0]
    if not curves:
        return None
    branches = [curve for curve in curves if curve.kind not in ("seed", "sparse", "dense")]
    with plot_style():
        figure = new_figure(10.4, 4.2)
        panels = figure.subplots(1, 2 if branches and len(branches) < len(curves) else 1, squeeze=False)[0]
        _draw_all(panels[0], curves)
        _finish(panels[0], curves)
        panels[0].set_ylabel("training loss in nats per token")
        panels[0].set_title("all models", loc="left")
        if len(panels) > 1:
            _draw_all(panels[1], branches)
            _finish(panels[1], branches)
            panels[1].set_title("the branches, enlarged", loc="left")
        figure.supxlabel(_tokens_label(curves), fontsize=9.5)
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside right upper", handlelength=1.6)
    return figure


def dev_curves(curves: Mapping[str, Sequence[Curve]]) -> "Figure | None":
    """Loss on dev documents over tokens: one small panel per domain with seed, dense and the domain's own ELM.

    Args:
        curves: Domain -> the runs that were evaluated on it.

    Returns:
        The figure; None when nothing was evaluated.
    """
    panels = {domain: [c for c in found if len(c.tokens)] for domain, found in curves.items()}
    panels = {domain: found for domain, found in panels.items() if found}
    if not panels:
        return None
    columns = min(_PANELS_PER_ROW, len(panels))
    rows = math.ceil(len(panels) / columns)
    with plot_style():
        figure = new_figure(min(10.4, 2.0 + 3.2 * columns), 0.9 + 2.05 * rows)
        grid = figure.subplots(rows, columns, sharex=True, squeeze=False)
        handles = {}
        for axes, (domain, found) in zip(grid.flat, panels.items(), strict=False):
            for curve in found:
                ink, label = _DEV_LINES.get(curve.kind, ("#4477aa", "own ELM"))
                marker = "o" if len(curve.tokens) < 12 else None
                (line,) = axes.plot(curve.tokens, curve.losses, color=ink, linewidth=1.6, marker=marker, markersize=3)
                handles.setdefault(label, line)
            axes.set_title(short(domain, 26), fontsize=9.5, loc="left")
            _finish(axes, found)
        for axes in list(grid.flat)[len(panels) :]:
            axes.set_visible(False)
        figure.supxlabel(_tokens_label([c for found in panels.values() for c in found]), fontsize=9.5)
        figure.supylabel("dev loss in nats per token", fontsize=9.5)
        figure.legend(handles.values(), handles.keys(), loc="outside upper right", ncols=3)
    return figure


def smoothed(values: Sequence[float], share: float = _SMOOTHING_SHARE) -> np.ndarray:
    """Exponential moving average over about ``share`` of the values, without a bias towards the first ones."""
    decay = 1 - 1 / max(1.0, len(values) * share)
    total, mass, result = 0.0, 0.0, np.empty(len(values))
    for index, value in enumerate(values):
        total, mass = decay * total + value, decay * mass + 1
        result[index] = total / mass
    return result


def _tokens_label(curves: Sequence[Curve]) -> str:
    has_seed = any(curve.kind not in ("sparse", "dense") for curve in curves)
    return "tokens read, the seed phase included" if has_seed else "tokens read"


def _draw_all(axes: "Axes", curves: Sequence[Curve]) -> None:
    elms = [curve.name for curve in curves if curve.kind not in ("seed", "sparse", "dense", "random")]
    colour, dash = colours(elms), dashes(elms)
    random = [curve for curve in curves if curve.kind == "random"]
    for index, curve in enumerate(random):
        _draw(axes, curve, LIGHT_GREY, label=f"random split ({len(random)})" if index == 0 else None, width=0.9)
    for curve in curves:
        if curve.kind != "random":
            ink = {"seed": GREY, "sparse": SPARSE, "dense": INK}.get(curve.kind) or colour[curve.name]
            width = 2.2 if curve.kind in ("seed", "sparse", "dense") else 1.4
            _draw(axes, curve, ink, label=short(curve.name), width=width, dash=dash.get(curve.name, "-"))


def _draw(axes: "Axes", curve: Curve, colour: str, *, label: str | None, width: float, dash: str = "-") -> None:
    tokens, losses = np.asarray(curve.tokens), np.asarray(curve.losses)
    smooth = smoothed(curve.losses)
    kept = np.unique(np.linspace(0, len(tokens) - 1, min(len(tokens), _MOST_POINTS)).round().astype(int))
    axes.plot(tokens[kept], losses[kept], color=colour, alpha=0.22, linewidth=0.8)
    axes.plot(tokens[kept], smooth[kept], color=colour, linewidth=width, linestyle=dash, label=label)


def _finish(axes: "Axes", curves: Sequence[Curve]) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axes.grid()
    axes.set_axisbelow(True)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: format_count(value)))
    losses = np.concatenate([np.asarray(curve.losses) for curve in curves])
    low, high = float(losses.min()), float(np.quantile(losses, 0.995))
    margin = max(0.05, 0.06 * (high - low))
    axes.set_ylim(low - margin, high + margin)
