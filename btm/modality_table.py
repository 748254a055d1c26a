"""Losses of text and of image tokens apart, and what causal routing costs: what such evaluations add to their table."""

import math
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from rich.table import Table
from rich.text import Text

from btm.records import TRAINING_ROUTING, Evaluation, ModelScores
from btm.tables import domain_label, new_table, plain

_WIDTH = 14


@dataclass(frozen=True, slots=True)
class ModalityLosses:
    """Losses in nats per token of every model in every domain with pictures, by modality."""

    columns: list[tuple[str, str]]
    """Domain and modality."""
    rows: Mapping[str, list[float | None]]
    """Model -> its loss in each column; None where it was not measured."""

    @classmethod
    def of(cls, evaluation: Evaluation) -> "ModalityLosses":
        """Those of an evaluation; without columns where there are no pictures."""
        found = {name: losses_by_domain(scores) for name, scores in evaluation.models.items()}
        domains = [*evaluation.domains, *evaluation.novel_domains]
        kinds = {domain: dict.fromkeys(k for row in found.values() for k in row.get(domain, {})) for domain in domains}
        columns = [(domain, kind) for domain in domains for kind in kinds[domain]]
        return cls(
            columns, {name: [row.get(domain, {}).get(kind) for domain, kind in columns] for name, row in found.items()}
        )

    def cells(self, row: str) -> Iterator[tuple[str, bool]]:
        """Text of each figure of a row, and whether it is the best of its column."""
        for value, column in zip(self.rows[row], zip(*self.rows.values(), strict=True), strict=True):
            best = min((other for other in column if other is not None), default=None)
            yield "-" if value is None else f"{value:.3f}", value is not None and value == best


def losses_by_domain(scores: ModelScores) -> dict[str, dict[str, float]]:
    """Domain with pictures -> modality -> loss of one model in nats per token."""
    return {
        domain: {kind: math.log(one.perplexity) for kind, one in score.modalities.items()}
        for domain, score in scores.domains.items()
        if score.modalities
    }


def routing_gap(evaluation: Evaluation) -> dict[str, dict[str, float]]:
    """What causal routing costs a sparse model over the routing of its training, in nats per token.

    Returns:
        Domain -> ``all`` and each modality -> the difference of the losses; empty for models with one routing.
    """
    if not {"sparse", TRAINING_ROUTING} <= evaluation.models.keys():
        return {}
    found = {}
    for domain, causal in evaluation.models["sparse"].domains.items():
        trained = evaluation.models[TRAINING_ROUTING].domains[domain]
        pairs = {"all": (causal.perplexity, trained.perplexity)} | {
            kind: (one.perplexity, trained.modalities[kind].perplexity) for kind, one in causal.modalities.items()
        }
        found[domain] = {kind: math.log(left / right) for kind, (left, right) in pairs.items()}
    return found


def routing_sentence(evaluation: Evaluation) -> str:
    """The gap over the trained domains in words; empty for models with one routing."""
    gaps = [gap["all"] for domain, gap in routing_gap(evaluation).items() if domain in evaluation.domains]
    if not gaps:
        return ""
    return (
        f"Routed causally (sparse) the model loses {sum(gaps) / len(gaps):.3f} nats per token against the routing of "
        f"its training ({TRAINING_ROUTING}), which looks at later tokens; mean over {len(gaps)} domains."
    )


def modality_table(evaluation: Evaluation) -> Table | None:
    """Table of the losses by modality for the terminal; None where there are no pictures.

    Args:
        evaluation: What was measured.
    """
    losses = ModalityLosses.of(evaluation)
    if not losses.columns:
        return None
    table = new_table(title="Loss by modality, nats per token (<image> and </image> count as text)")
    table.add_column("model", overflow="fold")
    for domain, kind in losses.columns:
        heading = "\n".join(textwrap.wrap(f"{domain_label(evaluation, domain)}: {kind}", _WIDTH))
        table.add_column(Text(heading), justify="right", no_wrap=True)
    for name in losses.rows:
        cells = [
            Text(f"{text}*", style="bold") if is_best else Text(f"{text} ") for text, is_best in losses.cells(name)
        ]
        table.add_row(Text(plain(name)), *cells)
    return table
