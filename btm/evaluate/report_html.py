"""Pieces of one self-contained web page: no scripts, no network, every text escaped."""

import html
from collections.abc import Collection, Iterable, Sequence
from typing import TYPE_CHECKING

from btm.evaluate.plots_style import svg_data_uri
from btm.tables import plain

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_PIXELS_PER_INCH = 96
_MANY_COLUMNS = 8
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
_CSS = """
:root { color-scheme: light dark; --ink: #1d2129; --soft: #5b6472; --line: #d9dde3; --page: #fff; --band: #f4f6f8;
  --good: #1a6e2e; --bad: #b3261e; --open: #7a5c00; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e7ec; --soft: #a3acb9; --line: #3a414c; --page: #15181d;
  --band: #1e232a; --good: #7bd88f; --bad: #ff8a80; --open: #e5c15c; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 72rem; font: 16px/1.5 system-ui, sans-serif;
  color: var(--ink); background: var(--page); }
h1 { font-size: 1.7rem; margin: 0 0 .2rem; } h2 { font-size: 1.25rem; margin: 2.6rem 0 .6rem; padding-bottom: .2rem;
  border-bottom: 1px solid var(--line); } h3 { font-size: 1rem; margin: 1.6rem 0 .4rem; }
p { max-width: 52rem; } .soft { color: var(--soft); } nav a { margin-right: 1rem; white-space: nowrap; }
a { color: inherit; }
h1, h2, h3, p, li, figcaption, code { overflow-wrap: anywhere; } td, th { overflow-wrap: break-word; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: .86rem; font-variant-numeric: tabular-nums;
  margin: .5rem 0; } caption { text-align: left; color: var(--soft); padding-bottom: .3rem; }
th, td { padding: .24rem .55rem; border-bottom: 1px solid var(--line); vertical-align: top; text-align: left; }
thead th { border-bottom: 2px solid var(--soft); vertical-align: bottom; max-width: 9rem; }
td.number, th.number { text-align: right; white-space: nowrap; } thead th.number { white-space: normal; }
tbody th { font-weight: 500; max-width: 13rem; } table.many { font-size: .78rem; }
table.many th, table.many td { padding: .22rem .3rem; } tbody tr:hover { background: var(--band); }
td small { display: block; color: var(--soft); font-size: .7rem; font-weight: 400; } td.best { font-weight: 700; }
figure { margin: .8rem 0 1.4rem; } figure img { max-width: 100%; height: auto; background: #fff; border-radius: 6px;
  border: 1px solid var(--line); padding: 6px; } figcaption { font-size: .88rem; color: var(--soft); max-width: 56rem; }
.verdicts { list-style: none; padding: 0; }
.verdicts li { margin: .5rem 0; padding: .5rem .8rem; background: var(--band);
  border-left: 5px solid var(--open); }
.verdicts .holds { border-color: var(--good); }
.verdicts .fails { border-color: var(--bad); } .verdicts b { display: block; }
.outcome { font-size: .78rem; font-weight: 700; text-transform: uppercase; letter-spacing: .04em; color: var(--open); }
.holds .outcome { color: var(--good); } .fails .outcome { color: var(--bad); }
pre { background: var(--band); padding: .7rem; overflow-x: auto; font-size: .82rem; white-space: pre-wrap;
  overflow-wrap: anywhere; } details { margin: .6rem 0; } summary { cursor: pointer; }
.reading { font: .84rem/1.75 ui-monospace, monospace; background: #fff; color: #111; padding: .7rem; border-radius: 6px;
  border: 1px solid var(--line); max-width: none; white-space: pre-wrap; }
.reading span { border-radius: 2px; padding: .1em 0; } .key { font-size: .8rem; } .key span { color: #111;
  padding: .1rem .5rem; border-radius: 3px; margin-right: .4rem; display: inline-block; margin-bottom: .2rem; }
@media print { :root { color-scheme: light; --ink: #000; --soft: #444; --line: #bbb; --page: #fff; --band: #f4f4f4;
  --good: #1a6e2e; --bad: #b3261e; --open: #7a5c00; } body { max-width: none; padding: 0; font-size: 10.5pt; }
  nav { display: none; } figure, .verdicts li, tr { break-inside: avoid; } h2, h3 { break-after: avoid; }
  .wide { overflow: visible; } table { font-size: 7.5pt; } th, td { padding: .15rem .25rem; }
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact; } }
@page { margin: 14mm; }
"""


def escape(text: object) -> str:
    """``text`` for element content and quoted attributes; control characters made visible."""
    return html.escape(plain(text), quote=True)


def page(title: str, body: Iterable[str]) -> str:
    """A whole document."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_CSS}</style>\n</head>\n<body>\n"
        + "\n".join(body)
        + "\n</body>\n</html>\n"
    )


def section(identifier: str, title: str, *parts: str) -> str:
    """A titled section; ``parts`` are markup already."""
    return f'<section id="{identifier}">\n<h2>{escape(title)}</h2>\n' + "\n".join(parts) + "\n</section>"


def heading(text: str) -> str:
    """A heading inside a section."""
    return f"<h3>{escape(text)}</h3>"


def paragraph(text: str, *, soft: bool = False) -> str:
    """A paragraph of plain text."""
    return f'<p class="soft">{escape(text)}</p>' if soft else f"<p>{escape(text)}</p>"


def figure(drawn: "Figure | None", caption: str) -> str:
    """A plot as an embedded image with its caption (also the text for those who cannot see it); empty for None."""
    if drawn is None:
        return ""
    width = round(drawn.get_size_inches()[0] * _PIXELS_PER_INCH)
    source = svg_data_uri(drawn)
    text = escape(caption)
    return f'<figure><img src="{source}" width="{width}" alt="{text}"><figcaption>{text}</figcaption></figure>'


def table(
    headings: Sequence[str], rows: Iterable[Sequence[str]], caption: str = "", *, words: Collection[str] = ()
) -> str:
    """A table whose cells are markup (:func:`text_cell`, :func:`number_cell`); the first column heads its rows.

    Args:
        headings: Of all columns; they stand to the right like the numbers below.
        rows: Cells of each row.
        caption: Above the table.
        words: Headings of columns of words, which stand to the left.
    """
    kinds = ["" if name in (headings[0], *words) else ' class="number"' for name in headings]
    top = "".join(f'<th scope="col"{kind}>{escape(name)}</th>' for name, kind in zip(headings, kinds, strict=True))
    size = ' class="many"' if len(headings) > _MANY_COLUMNS else ""
    body = "\n".join(f"<tr>{''.join(cells)}</tr>" for cells in rows)
    label = f"<caption>{escape(caption)}</caption>" if caption else ""
    return (
        f'<div class="wide"><table{size}>{label}<thead><tr>{top}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>'
    )


def row_head(text: object) -> str:
    """First cell of a row."""
    return f'<th scope="row">{escape(text)}</th>'


def text_cell(text: object) -> str:
    """A cell of words."""
    return f"<td>{escape(text)}</td>"


def number_cell(text: object, *, small: str = "", best: bool = False) -> str:
    """A cell that stands to the right; the best of its column is bold and starred."""
    below = f"<small>{escape(small)}</small>" if small else ""
    return f'<td class="number{" best" if best else ""}">{escape(text)}{"*" if best else ""}{below}</td>'


def details(title: str, *parts: str) -> str:
    """Parts that open on demand."""
    return f"<details><summary>{escape(title)}</summary>\n" + "\n".join(parts) + "\n</details>"


def preformatted(text: str) -> str:
    """Text with its line breaks."""
    return "<pre><code>" + "\n".join(escape(line) for line in text.splitlines()) + "</code></pre>"
