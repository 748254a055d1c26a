"""Tables for the terminal, and the same figures for scripts.

They are rich renderables: bold and boxes on a terminal, plain text in a pipe, where the best value of a column is still
marked by ``*``. Every text that came from a file is cleaned of control characters and never read as markup.
"""

import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.table import Table
from rich.text import Text

from btm.records import DomainScore, ElmRecord, Evaluation, ForestManifest, Ledger, ModelScores

_LONGEST_LABEL = 34
_LEDGER_WIDTH = 28
_DOMAIN_WIDTHS = (10, 8, 7)
"""Widths of a column of perplexities: the first at which all columns fit."""
_INTERVAL_WIDTH = 21
_SI_PREFIXES = ("", "k", "M", "G", "T", "P", "E", "Z")
_COUNT_PREFIXES = ("", "K", "M", "B", "T")


def plain(text: object) -> str:
    """``str(text)`` with everything unprintable (escape sequences, line breaks, bidi overrides) made visible."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in str(text))


def format_count(value: float) -> str:
    """Number of tokens, documents or parameters with three digits: ``987``, ``12.3K``, ``3.28M``, ``1.21B``."""
    return _scaled(value, _COUNT_PREFIXES)


def format_flops(value: float) -> str:
    """FLOPs with an SI prefix: ``4.35T`` is 4.35e12; a dash when nobody counted them."""
    return _scaled(value, _SI_PREFIXES) if value else "-"


def format_bytes(value: float) -> str:
    """Bytes with a decimal prefix: ``268 MB``."""
    number = _scaled(value, _SI_PREFIXES)
    return f"{number} B" if number[-1].isdigit() else f"{number[:-1]} {number[-1]}B"


def format_duration(seconds: float) -> str:
    """Time to two units: ``0.4 s``, ``45 s``, ``3 min 20 s``, ``1 h 02 min``, ``3 d 04 h``."""
    if not math.isfinite(seconds):
        return "-"
    if seconds < 10:
        return f"{max(seconds, 0):.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    if whole < 86400:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 86400} d {whole % 86400 // 3600:02d} h"


def format_perplexity(value: float) -> str:
    """Perplexity with four digits: ``9.871``, ``92.63``, ``106.5``, ``12345``, ``1.2e7``."""
    if not math.isfinite(value):
        return "inf" if value > 0 else "-"
    for limit, digits in ((10, 3), (100, 2), (10_000, 1), (1_000_000, 0)):
        if value < limit:
            return f"{value:.{digits}f}"
    return f"{value:.1e}".replace("e+0", "e").replace("e+", "e")


def mean_perplexity(scores: ModelScores, domains: Sequence[str]) -> float | None:
    """Arithmetic mean of the perplexities over ``domains``; None unless all of them were measured."""
    if not domains or any(domain not in scores.domains for domain in domains):
        return None
    return sum(scores.domains[domain].perplexity for domain in domains) / len(domains)


def domain_label(evaluation: Evaluation, domain: str) -> str:
    """Name of a domain, marked ``(novel)`` when no model trained on it, ``(added)`` when its ELM joined later."""
    if domain not in evaluation.novel_domains:
        return plain(domain)
    return f"{plain(domain)} (added)" if f"elm/{domain}" in evaluation.models else f"{plain(domain)} (novel)"


class EvaluationTable:
    """Perplexity of every model on every domain with its cost; becomes several tables where the width asks for it."""

    def __init__(self, evaluation: Evaluation, *, intervals: bool = False) -> None:
        self.evaluation = evaluation
        self.intervals = intervals

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        models = self.evaluation.models
        label = min(max(len("model"), *(len(plain(name)) for name in models), 0), _LONGEST_LABEL)
        columns: list[str | None] = [None, *self.evaluation.domains, *self.evaluation.novel_domains]
        ledger = any(scores.ledger for scores in models.values())
        room = options.max_width - label - 2
        width = _column_width(len(columns), room, intervals=self.intervals)
        beside = ledger and len(columns) * (width + 1) + _LEDGER_WIDTH <= room
        per_table = max(1, room // (width + 1))
        for first in range(0, len(columns), per_table):
            yield self._table(columns[first : first + per_table], label, width, with_ledger=beside)
        if ledger and not beside:
            yield self._table([], label, width, with_ledger=True)
        context = f"context {self.evaluation.sequence_length} tokens"
        yield Text(f"Perplexity per token on test documents, {context}; lower is better, * is best.")
        yield Text(f"mean: over {len(self.evaluation.domains)} domains, novel and added ones left out.")
        if self.intervals:
            yield Text("Intervals: 95 %, bootstrap over documents.")
        yield from (Text(f"{plain(name)}: {plain(scores.note)}") for name, scores in models.items() if scores.note)

    def _table(self, columns: Sequence[str | None], label: int, width: int, *, with_ledger: bool) -> Table:
        table = new_table()
        table.add_column("model", width=label, overflow="fold")
        for domain in columns:
            table.add_column(_heading(domain, self.evaluation, width), justify="right", width=width, no_wrap=True)
        for name in ("tokens", "FLOPs", "time") if with_ledger else ():
            table.add_column(name, justify="right", no_wrap=True)
        best = {domain: _best(self.evaluation, domain) for domain in columns}
        for name, scores in self.evaluation.models.items():
            cells = [self._cell(scores, domain, best[domain]) for domain in columns]
            table.add_row(Text(plain(name)), *cells, *(_ledger_cells(scores.ledger) if with_ledger else ()))
        return table

    def _cell(self, scores: ModelScores, domain: str | None, best: float | None) -> Text:
        value = _value(self.evaluation, scores, domain)
        if value is None:
            return Text("- ")
        text = format_perplexity(value)
        if self.intervals and domain is not None:
            score = scores.domains[domain]
            text += f" {format_perplexity(score.low)}-{format_perplexity(score.high)}"
        return Text(f"{text}*", style="bold") if value == best else Text(f"{text} ")


def evaluation_table(evaluation: Evaluation, *, intervals: bool = False) -> EvaluationTable:
    """Table of ``evaluation``: rows models, columns domains, novel domains and their mean, then the ledger.

    Args:
        evaluation: What was measured.
        intervals: Show the 95 % bootstrap interval beside each perplexity.
    """
    return EvaluationTable(evaluation, intervals=intervals)


def evaluation_json(evaluation: Evaluation) -> dict[str, Any]:
    """The figures of :func:`evaluation_table` as plain JSON values, for ``--json``."""
    rows = {}
    for name, scores in evaluation.models.items():
        rows[name] = {
            "perplexity": {domain: score.perplexity for domain, score in scores.domains.items()},
            "interval": {domain: [score.low, score.high] for domain, score in scores.domains.items()},
            "bits_per_byte": {domain: score.bits_per_byte for domain, score in scores.domains.items()},
            "mean_perplexity": mean_perplexity(scores, evaluation.domains),
            "mean_perplexity_novel": mean_perplexity(scores, evaluation.novel_domains),
            "ledger": scores.ledger.model_dump() if scores.ledger else None,
            "note": scores.note,
        }
    return {"domains": evaluation.domains, "novel_domains": evaluation.novel_domains, "models": rows}


def forest_table(manifest: ForestManifest) -> RenderableType:
    """Table of the models of a forest: parents, parameters, tokens, own dev loss, origin and time of joining."""
    table = new_table(title=f"forest {manifest.name}: {len(manifest.elms)} ELMs")
    for name in ("model", "branched from"):
        table.add_column(name, overflow="fold", ratio=1, min_width=12)
    for name in ("parameters", "tokens", "dev loss", "origin"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("joined (UTC)", no_wrap=True)
    for record in [*([manifest.seed] if manifest.seed else []), *manifest.elms]:
        loss = record.dev_loss.get(record.domain)
        table.add_row(
            Text(plain("seed" if record is manifest.seed else record.domain)),
            Text(parents_text(record)),
            format_count(record.num_parameters),
            "-" if record.origin == "imported" else format_count(record.ledger.tokens),
            "-" if loss is None else f"{loss:.3f}",
            record.origin,
            Text(plain(record.created[:16].replace("T", " "))),
        )
    return table


def parents_text(record: ElmRecord, *, at_most: int = 4) -> str:
    """Parents of an ELM with their weights, heaviest first: ``law 0.62 + medicine 0.38``."""
    parents = sorted(record.parents, key=lambda parent: -parent.weight)
    if len(parents) == 1 and parents[0].weight == 1:
        return plain(parents[0].name)
    shown = [f"{plain(parent.name)} {parent.weight:.2f}" for parent in parents[:at_most]]
    more = [f"{len(parents) - at_most} more"] if len(parents) > at_most else []
    return " + ".join([*shown, *more]) or "-"


def _cost_facts(record: ElmRecord) -> dict[str, object]:
    if record.origin == "imported":
        return {"training": "elsewhere, at a cost not recorded"}
    return {
        "tokens read": f"{record.ledger.tokens:,}",
        "FLOPs": f"{record.ledger.flops:.3g}",
        "training time": format_duration(record.ledger.seconds),
    }


def elm_table(record: ElmRecord) -> RenderableType:
    """Everything that the forest knows of one ELM."""
    facts: dict[str, object] = {
        "domain": record.domain,
        "directory": record.directory,
        "branched from": parents_text(record, at_most=len(record.parents)),
        "ancestors": ", ".join(record.ancestors) or "none but the seed",
        "origin": record.origin,
        "joined (UTC)": record.created,
        "parameters": f"{record.num_parameters:,}",
        **_cost_facts(record),
        "data fingerprint": record.data_fingerprint,
    }
    parts = [key_value_table(facts)]
    if record.dev_loss:
        rows = {domain: f"{loss:.4f} nats/token" for domain, loss in sorted(record.dev_loss.items())}
        parts.append(key_value_table(rows, title="dev loss"))
    parts.append(key_value_table(record.files, title="files (SHA-256)"))
    return Group(*parts)


def key_value_table(values: Mapping[str, object], *, title: str | None = None) -> Table:
    """Two columns, one line per entry of ``values``; texts are shown as they are, without markup."""
    table = Table(
        box=None, show_header=False, title=Text(plain(title), style="bold") if title else None, title_justify="left"
    )
    table.add_column(no_wrap=True, style="dim")
    table.add_column(overflow="fold")
    for key, value in values.items():
        table.add_row(Text(plain(key)), Text(plain(value)))
    return table


def rows_table(headings: Sequence[str], rows: Iterable[Sequence[object]], *, title: str | None = None) -> Table:
    """Any table of texts and numbers; numbers (and columns of them) stand to the right."""
    listed = [list(row) for row in rows]
    table = new_table(title=title)
    for index, heading in enumerate(headings):
        numeric = bool(listed) and all(isinstance(row[index], int | float) for row in listed)
        table.add_column(Text(plain(heading)), justify="right" if numeric else "left", overflow="fold")
    for row in listed:
        table.add_row(*(Text(plain(value)) for value in row))
    return table


def new_table(title: str | None = None) -> Table:
    """An empty table in the style of all others."""
    heading = Text(plain(title), style="bold") if title else None
    return Table(box=box.SIMPLE_HEAD, title=heading, title_justify="left", padding=(0, 0), header_style="bold")


def _scaled(value: float, prefixes: Sequence[str]) -> str:
    if not math.isfinite(value):
        return "-"
    scale = 0
    while abs(value) >= 999.5 and scale < len(prefixes) - 1:
        value /= 1000
        scale += 1
    if scale == 0 and value == int(value):
        return str(int(value))
    digits = 2 if abs(value) < 9.995 else 1 if abs(value) < 99.95 else 0
    return f"{value:.{digits}f}{prefixes[scale]}"


def _column_width(num_columns: int, room: int, *, intervals: bool) -> int:
    if intervals:
        return _INTERVAL_WIDTH
    return next((width for width in _DOMAIN_WIDTHS if num_columns * (width + 1) <= room), _DOMAIN_WIDTHS[0])


def _heading(domain: str | None, evaluation: Evaluation, width: int) -> Text:
    if domain is None:
        return Text("mean", style="bold italic")
    name = domain_label(evaluation, domain)
    return Text("\n".join(textwrap.wrap(name, width, break_on_hyphens=True)))


def _value(evaluation: Evaluation, scores: ModelScores, domain: str | None) -> float | None:
    if domain is None:
        return mean_perplexity(scores, evaluation.domains)
    score: DomainScore | None = scores.domains.get(domain)
    return None if score is None else score.perplexity


def _best(evaluation: Evaluation, domain: str | None) -> float | None:
    values = [_value(evaluation, scores, domain) for scores in evaluation.models.values()]
    return min((value for value in values if value is not None), default=None)


def _ledger_cells(ledger: Ledger | None) -> list[str]:
    if ledger is None:
        return ["-", "-", "-"]
    return [format_count(ledger.tokens), format_flops(ledger.flops), format_duration(ledger.seconds)]
