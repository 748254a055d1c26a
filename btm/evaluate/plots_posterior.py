"""Plot of the domain posterior while a document is read (Branch-Train-Merge, https://arxiv.org/abs/2208.03306)."""

from typing import TYPE_CHECKING

import numpy as np

from btm.evaluate.plots_style import colours, new_figure, plot_style, short
from btm.records import PosteriorTrace
from btm.tables import plain

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MOST_TOKENS = 600
_MOST_LABELS = 56
_LONGEST_TOKEN = 14
_SPACES = {"\n": "\u21b5", "\t": "\u21e5", " ": "\u2423", "\r": "\u240d"}


def posterior_plot(trace: PosteriorTrace, members: str = "ELM") -> "Figure | None":
    """Stacked areas of the ELMs' posterior weights over token positions, some of the tokens on the axis.

    Args:
        trace: What was measured.
        members: What the mixed models are called.

    Returns:
        The figure; None for an empty trace.
    """
    weights = np.asarray(trace.weights[:_MOST_TOKENS], dtype=float)
    if weights.ndim != 2 or weights.size == 0:
        return None
    positions = np.arange(len(weights))
    colour = colours(trace.elms)
    with plot_style():
        figure = new_figure(10.4, 3.9)
        axes: Axes = figure.subplots()
        hatches = ["//" if index >= len(set(colour.values())) else "" for index in range(len(trace.elms))]
        areas = axes.stackplot(
            positions,
            weights.T,
            labels=[short(elm) for elm in trace.elms],
            colors=[colour[elm] for elm in trace.elms],
            linewidth=0,
        )
        for area, hatch in zip(areas, hatches, strict=True):
            area.set_hatch(hatch)
        axes.set_ylim(0, 1)
        axes.set_xlim(0, max(1, len(weights) - 1))
        step = max(1, -(-len(weights) // _MOST_LABELS))
        shown = positions[::step]
        labels = [token_label(trace.tokens[index]) if index < len(trace.tokens) else "" for index in shown]
        axes.set_xticks(shown, labels, rotation=90, fontsize=7.5, fontfamily="monospace")
        axes.set_ylabel("posterior weight")
        every = "every token" if step == 1 else f"every {_ordinal(step)} token"
        axes.set_xlabel(f"the document as it is read, {len(weights)} tokens ({every} is named)")
        axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1), title=members, alignment="left", reverse=True)
    return figure


def token_label(token: str) -> str:
    """A token as one short visible word: spaces and line breaks as symbols, the rest escaped when unprintable."""
    visible = "".join(_SPACES.get(char, char) for char in token)
    text = plain(visible)
    return text if len(text) <= _LONGEST_TOKEN else f"{text[: _LONGEST_TOKEN - 1]}\u2026"


def _ordinal(number: int) -> str:
    ending = "th" if number % 100 in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number}{ending}"
