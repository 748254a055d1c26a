"""``python -m btm.evaluate.report <forest>``: one self-contained HTML page about a forest.

The page needs no network and no script, and says in words whether the run showed what Branch-Train-Merge promises
(https://arxiv.org/abs/2208.03306), or how a sparse model compares with a dense one, also where it is no better. Parts
that a forest does not have (yet) are named and left out.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from btm.errors import BtmError, ForestError
from btm.evaluate import report_html as web
from btm.evaluate.plots import domain_bars, ledger_bars, perplexity_matrix, prior_matrix
from btm.evaluate.plots_curves import dev_curves, loss_curves
from btm.evaluate.plots_lineage import lineage_plot
from btm.evaluate.plots_posterior import posterior_plot
from btm.evaluate.report_data import ReportData, dev_curves_of, load_report_data, loss_curves_of
from btm.evaluate.report_experts import expert_parts
from btm.evaluate.report_reading import reading
from btm.evaluate.report_reproduce import reproduce_parts
from btm.evaluate.report_tables import (
    bits_table,
    ledger_table,
    lineage_table,
    modality_table,
    perplexity_table,
    runs_table,
)
from btm.evaluate.report_verdicts import headline, verdicts
from btm.evaluate.report_verdicts_compare import Verdict, main_ensemble
from btm.files import write_atomic
from btm.modality_table import routing_sentence
from btm.records import PosteriorTrace
from btm.tables import format_count, plain

_MOST_TRACES = 4


def write_report(forest_dir: Path) -> Path:
    """Write ``report.html`` into a forest directory.

    Returns:
        Its path.

    Raises:
        ForestError: If ``forest_dir`` is no directory.
    """
    if not forest_dir.is_dir():
        raise ForestError(f"{forest_dir} is no directory; give the forest directory that a run wrote")
    path = forest_dir / "report.html"
    write_atomic(path, report_page(load_report_data(forest_dir), forest_dir.name))
    return path


def report_page(data: ReportData, fallback_name: str) -> str:
    """The whole page as HTML text."""
    name = data.manifest.name if data.manifest else fallback_name
    kind, found = "Sparse model" if data.is_sparse else "Forest", verdicts(data)
    sections = [
        ("summary", "Summary", _summary(data, found)),
        ("perplexity", "Perplexity", _perplexity(data)),
        ("training", "Training", _training(data)),
        ("experts", "Expert layers", expert_parts(data)),
        ("posterior", "Domain posterior", _posterior(data)),
        ("added", "Domains added later", _added(data)),
        ("ledger", "Ledger", _ledger(data)),
        ("lineage", "Lineage", _lineage(data)),
        ("reproduce", "How to reproduce", reproduce_parts(data)),
    ]
    shown = [(key, title, [part for part in parts if part]) for key, title, parts in sections]
    shown = [(key, title, parts) for key, title, parts in shown if parts]
    links = "".join(f'<a href="#{key}">{web.escape(title)}</a>' for key, title, _ in shown)
    body = [
        f"<header><h1>{kind} {web.escape(name)}</h1>{web.paragraph(_subtitle(data), soft=True)}",
        f'<nav aria-label="Sections">{links}</nav></header>',
        "<main>",
        *(web.section(key, title, *parts) for key, title, parts in shown),
        "</main>",
    ]
    return web.page(f"{kind} {plain(name)}: report", body)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command-line entry; prints the path of the report."""
    parser = argparse.ArgumentParser(prog="python -m btm.evaluate.report", description="Write <forest>/report.html.")
    parser.add_argument("forest", type=Path, help="forest directory")
    given = parser.parse_args(arguments)
    try:
        path = write_report(given.forest)
    except BtmError as error:
        sys.stderr.write(f"error: {plain(error)}\n")
        return error.exit_code
    sys.stdout.write(f"{path}\n")
    return 0


def _subtitle(data: ReportData) -> str:
    facts = []
    if data.is_sparse:
        results = [run.result for run in data.runs if run.name == "sparse" and run.result]
        facts = [f"{format_count(result.num_parameters)} parameters" for result in results]
        facts += [f"vocabulary of {data.manifest.vocab_size:,}"] if data.manifest else []
    elif data.manifest:
        facts.append(f"{len(data.manifest.elms)} ELMs")
        records = [*([data.manifest.seed] if data.manifest.seed else []), *data.manifest.elms]
        if records:
            facts.append(f"{format_count(records[-1].num_parameters)} parameters each")
            facts.append(f"vocabulary of {data.manifest.vocab_size:,}")
            facts.append(f"last change {max(record.created for record in records)[:16].replace('T', ' ')} UTC")
    return "; ".join(facts) or "There is no manifest (forest.json), so little is known of this run."


def _summary(data: ReportData, found: Sequence[Verdict]) -> list[str]:
    items = "\n".join(
        f'<li class="{verdict.outcome.split()[0]}"><span class="outcome">{web.escape(verdict.outcome)}</span>'
        f"<b>{web.escape(verdict.claim)}</b>{web.escape(verdict.finding)}</li>"
        for verdict in found
    )
    parts = [web.paragraph(headline(found)), f'<ul class="verdicts">\n{items}\n</ul>']
    if data.missing:
        listed = "".join(f"<li>{web.escape(sentence)}</li>" for sentence in data.missing)
        parts += [web.heading("Not in this report"), f"<ul>{listed}</ul>"]
    return parts


def _perplexity(data: ReportData) -> list[str]:
    evaluation = data.evaluation
    if evaluation is None or not evaluation.models:
        return [web.paragraph("Nothing was evaluated; `btm evaluate` measures a forest.")]
    ensemble = main_ensemble(evaluation)
    shown = f" ({ensemble} shown)" if ensemble in evaluation.models else ""
    framed = "best of each domain is" if data.is_sparse else "best ELM and the best other model of each domain are"
    return [
        web.paragraph(
            f"Perplexity per token of the shared tokenizer on held-out test documents, read in windows of "
            f"{evaluation.sequence_length} tokens that are the same for every model. Lower is better."
        ),
        perplexity_table(evaluation),
        modality_table(evaluation),
        web.paragraph(routing_sentence(evaluation)) if routing_sentence(evaluation) else "",
        web.details("Bits per byte, which models with other tokenizers can be compared by", bits_table(evaluation)),
        web.heading("Comparison by domain"),
        web.figure(
            domain_bars(evaluation, ensemble),
            f"Test perplexity per token by domain with 95 % bootstrap intervals over documents{shown}.",
        ),
        web.heading("Every model on every domain"),
        web.figure(
            perplexity_matrix(evaluation),
            "Perplexity of each model (rows) on each domain (columns). Colour is the perplexity divided by the best "
            f"of the domain, on a log scale; the {framed} framed.",
        ),
    ]


def _training(data: ReportData) -> list[str]:
    if not data.runs:
        return [web.paragraph("No training run was found.")]
    branches = "" if data.is_sparse else "; the branches begin where the seed model ended"
    compared = "sparse and dense model" if data.is_sparse else "seed model, dense model and the ELM of that domain"
    return [
        web.figure(
            loss_curves(loss_curves_of(data)),
            f"Training loss over the tokens that a model has read{branches}. "
            "Thick: moving average; faint: single measurements.",
        ),
        web.heading("Development loss by domain"),
        web.figure(
            dev_curves(dev_curves_of(data)),
            f"Loss on development documents of each domain: {compared}.",
        ),
        web.heading("Runs"),
        runs_table(data.runs),
    ]


def _posterior(data: ReportData) -> list[str]:
    evaluation = data.evaluation
    member, members = ("domain's model", "domains' models") if data.is_sparse else ("ELM", "ELMs")
    if evaluation is None:
        return []
    shown = [markup for trace in evaluation.traces if (markup := _trace(trace, member, members))]
    parts = shown[:_MOST_TRACES]
    if rest := shown[_MOST_TRACES:]:
        parts.append(web.details(f"Documents of {len(rest)} more domains", *rest))
    priors = prior_matrix(evaluation)
    if priors is not None:
        caption = (
            f"Cached priors: weights of the {members} (columns) estimated on development documents of a domain (rows)."
        )
        parts += [web.heading("Cached priors"), web.figure(priors, caption)]
    return parts


def _trace(trace: PosteriorTrace, member: str, members: str) -> str:
    drawn = posterior_plot(trace, member)
    if drawn is None:
        return ""
    caption = (
        f"Weights of the {members} in predicting each token of a test document of {plain(trace.domain)}: prior times "
        "likelihood of everything read before it."
    )
    return web.heading(f"A document of {plain(trace.domain)}") + web.figure(drawn, caption) + reading(trace, member)


def _added(data: ReportData) -> list[str]:
    parts = []
    for domain, evaluation in data.later.items():
        parts += [
            web.heading(f"The forest with {plain(domain)}"),
            web.paragraph("The same measurements after the domain's ELM joined; the baselines did not train on it."),
            perplexity_table(evaluation),
            web.figure(
                perplexity_matrix(evaluation) if evaluation.models else None,
                f"Perplexity of each model on each domain after {plain(domain)} joined; colours as above.",
            ),
        ]
    return parts


def _ledger(data: ReportData) -> list[str]:
    models = data.evaluation.models if data.evaluation else {}
    ledgers = {name: scores.ledger for name, scores in models.items() if scores.ledger}
    if not ledgers:
        return [web.paragraph("No model has a ledger.")]
    text, light = "What each model cost to train.", ""
    if not data.is_sparse:
        text = (
            "What each model cost to train, the seed phase included in everything that branched from it. Time is "
            "wall-clock summed over runs: ELMs that trained side by side took less."
        )
        light = "; light: seed phase"
    return [
        web.paragraph(text),
        web.figure(ledger_bars(ledgers), f"Training tokens, FLOPs and time by model{light}."),
        web.details("The same in figures", ledger_table(ledgers)),
    ]


def _lineage(data: ReportData) -> list[str]:
    if data.is_sparse:
        return []
    if data.manifest is None or not data.manifest.elms:
        return [web.paragraph("The forest has no ELM.")]
    return [
        web.figure(
            lineage_plot(data.manifest), "Which model branched from which; tokens are those of its own training."
        ),
        lineage_table(data.manifest),
    ]


if __name__ == "__main__":
    sys.exit(main())
