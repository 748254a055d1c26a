"""Common look of all plots: fonts, colours that colour-blind readers tell apart, and the way into a web page.

Figures are made without pyplot, so nothing global is kept. Text that comes from files is never read as mathematics.
"""

import base64
import contextlib
import io
import logging
import warnings
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from btm.tables import plain

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LONGEST_NAME = 30
INK = "#222222"
GREY = "#8a8a8a"
LIGHT_GREY = "#c8c8c8"
SPARSE = "#228833"
_PALETTE = (
    "#4477aa",
    "#ee7733",
    "#228833",
    "#cc3377",
    "#66ccee",
    "#ccbb44",
    "#882255",
    "#44aa99",
    "#999933",
    "#332288",
    "#ddaa99",
    "#117733",
)
_DASHES = ("-", "--", ":", "-.")
_RC: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.size": 9.5,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.grid": False,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.7,
    "legend.frameon": False,
    "text.parse_math": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "btm",
    "figure.facecolor": "white",
    "path.simplify": True,
}


@contextlib.contextmanager
def plot_style() -> Iterator[None]:
    """Settings under which figures are built and written; glyphs that our fonts lack are left to the viewer's."""
    import matplotlib

    logger = logging.getLogger("matplotlib.font_manager")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with matplotlib.rc_context(_RC), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Glyph .* missing")
            yield
    finally:
        logger.setLevel(level)


def new_figure(width_in: float, height_in: float) -> "Figure":
    """Empty white figure whose parts are laid out so that nothing overlaps; call under :func:`plot_style`."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width_in, height_in), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def svg_data_uri(figure: "Figure") -> str:
    """The figure as ``data:image/svg+xml;base64,...``: inside an ``img`` element no text in it can act as markup."""
    buffer = io.BytesIO()
    with plot_style():
        figure.savefig(buffer, format="svg", metadata={"Date": None}, bbox_inches="tight", pad_inches=0.08)
    return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode()


def png_bytes(figure: "Figure", *, dots_per_inch: int = 120) -> bytes:
    """The figure as a PNG image."""
    buffer = io.BytesIO()
    with plot_style():
        figure.savefig(buffer, format="png", dpi=dots_per_inch, bbox_inches="tight", pad_inches=0.08)
    return buffer.getvalue()


def short(name: str, longest: int = LONGEST_NAME) -> str:
    """``name`` made printable, its middle left out when it is longer than ``longest``."""
    text = plain(name)
    if len(text) <= longest:
        return text
    head = (longest - 1) // 2
    return f"{text[:head]}\u2026{text[len(text) - (longest - 1 - head) :]}"


def colours(names: Sequence[str]) -> dict[str, str]:
    """A colour per name, in order; names beyond the palette repeat it (and differ by :func:`dashes`)."""
    return {name: _PALETTE[index % len(_PALETTE)] for index, name in enumerate(names)}


def dashes(names: Sequence[str]) -> dict[str, str]:
    """A line style per name: solid for the first twelve, then dashed, dotted, dash-dotted."""
    return {name: _DASHES[index // len(_PALETTE) % len(_DASHES)] for index, name in enumerate(names)}
