"""HTML tables of a report: perplexity, bits per byte, ledger, training runs, lineage."""

from collections.abc import Callable, Mapping, Sequence
from statistics import fmean

from btm.evaluate import report_html as web
from btm.evaluate.report_data import Run
from btm.modality_table import ModalityLosses
from btm.records import DomainScore, Evaluation, ForestManifest, Ledger
from btm.tables import (
    domain_label,
    format_count,
    format_duration,
    format_flops,
    format_perplexity,
    mean_perplexity,
    parents_text,
)


def perplexity_table(evaluation: Evaluation) -> str:
    """Rows models, columns mean and domains, the 95 % interval under each figure, the best of a column starred."""

    def cell(score: DomainScore) -> tuple[float, str, str]:
        interval = f"{format_perplexity(score.low)}\u2013{format_perplexity(score.high)}"
        return score.perplexity, format_perplexity(score.perplexity), interval

    caption = (
        "Test perplexity per token; below it the 95 % interval of a bootstrap over documents; * is the best of a "
        f"column. The mean is over {len(evaluation.domains)} domains, novel and added ones left out."
    )
    means = {name: mean_perplexity(scores, evaluation.domains) for name, scores in evaluation.models.items()}
    notes = "; ".join(f"{name}: {scores.note}" for name, scores in evaluation.models.items() if scores.note)
    table = _score_table(evaluation, means, cell, format_perplexity, caption)
    return table + (web.paragraph(f"Rows: {notes}.", soft=True) if notes else "")


def modality_table(evaluation: Evaluation) -> str:
    """Loss of text and of image tokens apart, one column for each domain with pictures; empty without pictures."""
    losses = ModalityLosses.of(evaluation)
    if not losses.columns:
        return ""
    rows = [
        [web.row_head(name), *(web.number_cell(text, best=is_best) for text, is_best in losses.cells(name))]
        for name in losses.rows
    ]
    headings = ["model", *(f"{domain_label(evaluation, domain)}: {kind}" for domain, kind in losses.columns)]
    caption = "Test loss in nats per token of text and of image tokens apart; the marks around pictures count as text."
    return web.table(headings, rows, caption)


def bits_table(evaluation: Evaluation) -> str:
    """The same table in bits per byte of text."""
    means = {}
    for name, scores in evaluation.models.items():
        found = [scores.domains[domain].bits_per_byte for domain in evaluation.domains if domain in scores.domains]
        means[name] = fmean(found) if found and len(found) == len(evaluation.domains) else None

    def cell(score: DomainScore) -> tuple[float, str, str]:
        return score.bits_per_byte, f"{score.bits_per_byte:.3f}", ""

    return _score_table(evaluation, means, cell, lambda value: f"{value:.3f}", "Bits per byte on test documents.")


def ledger_table(ledgers: Mapping[str, Ledger]) -> str:
    """Tokens, FLOPs and time of each model."""
    rows = [
        [
            web.row_head(name),
            web.number_cell(f"{ledger.tokens:,}"),
            web.number_cell(format_flops(ledger.flops)),
            web.number_cell(format_duration(ledger.seconds)),
        ]
        for name, ledger in ledgers.items()
    ]
    return web.table(["model", "tokens", "FLOPs", "time"], rows)


def runs_table(runs: Sequence[Run]) -> str:
    """What each training run did: its cost, its speed, its last loss, the tokens that it drew from each domain."""
    headings = ["run", "updates", "tokens", "FLOPs", "time", "tokens/s", "skipped updates", "final loss", "drawn from"]
    rows = []
    for run in runs:
        if run.result is None:
            state = f"not finished, update {run.rows[-1]['update']}" if run.rows else "not finished"
            rows.append(
                [web.row_head(run.name), web.number_cell(state), *[web.number_cell("-")] * 6, web.text_cell("-")]
            )
            continue
        ledger = run.result.ledger
        drawn = run.result.realised_tokens
        share = ", ".join(f"{domain} {format_count(tokens)}" for domain, tokens in drawn.items())
        rows.append(
            [
                web.row_head(run.name),
                web.number_cell(f"{run.result.updates:,}"),
                web.number_cell(f"{ledger.tokens:,}"),
                web.number_cell(format_flops(ledger.flops)),
                web.number_cell(format_duration(ledger.seconds)),
                web.number_cell(format_count(ledger.tokens / ledger.seconds) if ledger.seconds else "-"),
                web.number_cell(run.result.skipped_updates),
                web.number_cell(f"{run.result.final_loss:.3f}"),
                web.text_cell(share or "-"),
            ]
        )
    caption = "Tokens, FLOPs and wall-clock time of each run alone; loss in nats per token."
    return web.table(headings, rows, caption, words=["drawn from"])


def lineage_table(manifest: ForestManifest) -> str:
    """Every model of a forest with its parents and the checksum of its weights."""
    headings = ["model", "branched from", "data of", "own tokens", "parameters", "dev loss", "joined (UTC)", "weights"]
    rows = []
    for record in [*([manifest.seed] if manifest.seed else []), *manifest.elms]:
        name = "seed" if record is manifest.seed else record.domain
        loss = record.dev_loss.get(record.domain)
        weights = [digest[:12] for file, digest in record.files.items() if file.endswith(".safetensors")]
        rows.append(
            [
                web.row_head(name),
                web.text_cell(parents_text(record, at_most=len(record.parents)) + _imported(record.origin)),
                web.text_cell(", ".join(record.ancestors) or "-"),
                web.number_cell(format_count(record.ledger.tokens)),
                web.number_cell(f"{record.num_parameters:,}"),
                web.number_cell("-" if loss is None else f"{loss:.3f}"),
                web.text_cell(record.created[:16].replace("T", " ")),
                web.text_cell(" ".join(weights) or "-"),
            ]
        )
    caption = (
        '"Data of": other ELMs whose weights went into the branch, so that their data is in it too. Dev loss: own '
        "domain, nats per token. Weights: first digits of the SHA-256."
    )
    words = ["branched from", "data of", "joined (UTC)", "weights"]
    return web.table(headings, rows, caption, words=words)


def _imported(origin: str) -> str:
    return " (imported)" if origin == "imported" else ""


def _score_table(
    evaluation: Evaluation,
    means: Mapping[str, float | None],
    cell: Callable[[DomainScore], tuple[float, str, str]],
    form: Callable[[float], str],
    caption: str,
) -> str:
    domains = [*evaluation.domains, *evaluation.novel_domains]
    models = evaluation.models.values()
    best = {d: min((cell(m.domains[d])[0] for m in models if d in m.domains), default=None) for d in domains}
    best_mean = min((mean for mean in means.values() if mean is not None), default=None)
    rows = []
    for name, scores in evaluation.models.items():
        mean = means[name]
        cells = [web.row_head(name)]
        cells.append(web.number_cell("-" if mean is None else form(mean), best=mean is not None and mean == best_mean))
        for domain in domains:
            if domain not in scores.domains:
                cells.append(web.number_cell("-"))
                continue
            value, text, small = cell(scores.domains[domain])
            cells.append(web.number_cell(text, small=small, best=value == best[domain]))
        rows.append(cells)
    return web.table(["model", "mean", *(domain_label(evaluation, d) for d in domains)], rows, caption)
