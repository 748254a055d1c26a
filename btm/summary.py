"""``summary.json``: the figures of a run in one flat file, with the relations that Branch-Train-Merge promises."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from btm.files import write_json
from btm.forest import Forest, file_hashes
from btm.modality_table import losses_by_domain, routing_gap
from btm.records import TRAINING_ROUTING, Evaluation
from btm.tables import mean_perplexity

_ADDED_ROW = "ensemble/cached"
_FOREST_CLAIMS = (
    ("the ensemble beats the dense model of equal tokens", "ensemble/uniform", "dense"),
    ("ELMs of domains beat ELMs of a random split", "ensemble/uniform", "random_split/ensemble"),
    ("the posterior average beats the uniform average", "average/posterior", "average/uniform"),
)
_SPARSE_CLAIMS = (
    ("the sparse model beats the dense model of equal tokens", "sparse", "dense"),
    ("routed as in training, it beats the dense model of equal tokens", TRAINING_ROUTING, "dense"),
    ("the mixture of its domains by their posterior beats the dense model", "ensemble/uniform", "dense"),
)


def write_summary(forest_dir: Path, added: Sequence[str]) -> dict[str, Any]:
    """Collect the evaluation of the first round and of every domain added since, and write ``summary.json``.

    Args:
        forest_dir: The forest.
        added: Domains that joined after the first round, each with an ``evaluation-with-<domain>.json``.

    Returns:
        What was written.
    """
    evaluation = Evaluation.load(forest_dir / "evaluation.json")
    summary: dict[str, Any] = {
        "domains": evaluation.domains,
        "novel_domains": evaluation.novel_domains,
        "ledger": {
            name: scores.ledger.model_dump(mode="json") for name, scores in evaluation.models.items() if scores.ledger
        },
        "perplexity": {
            name: {domain: score.perplexity for domain, score in scores.domains.items()}
            for name, scores in evaluation.models.items()
        },
    }
    losses = {name: found for name, scores in evaluation.models.items() if (found := losses_by_domain(scores))}
    if losses:
        summary["loss_by_modality"] = losses
    if gap := routing_gap(evaluation):
        summary["routing_gap"] = gap
    additions = [_added_domain(forest_dir, evaluation, domain) for domain in added]
    if additions:
        summary["added_domain"] = additions[0] if len(additions) == 1 else additions
    summary["relations"] = relations(evaluation) + [
        {
            "claim": f"the ensemble reads {item['name']} better with its ELM than without",
            "left": item["perplexity_after"],
            "right": item["perplexity_before"],
            "holds": item["perplexity_after"] < item["perplexity_before"],
        }
        for item in additions
    ]
    write_json(forest_dir / "summary.json", summary)
    return summary


def relations(evaluation: Evaluation) -> list[dict[str, Any]]:
    """Expected orderings of perplexity averaged over the trained domains, each with both figures and the verdict."""
    claims = _SPARSE_CLAIMS if "sparse" in evaluation.models else _FOREST_CLAIMS
    # The averages and ensembles of a single ELM are that ELM: nothing to compare.
    if len(evaluation.domains) < 2:
        claims = [claim for claim in claims if claim[1].startswith("sparse")]
    found = []
    for claim, left, right in claims:
        if left in evaluation.models and right in evaluation.models:
            a, b = (mean_perplexity(evaluation.models[name], evaluation.domains) for name in (left, right))
            if a is not None and b is not None:
                found.append({"claim": claim, "left": a, "right": b, "holds": a < b})
    return found


def _added_domain(forest_dir: Path, before: Evaluation, domain: str) -> dict[str, Any]:
    after = Evaluation.load(forest_dir / f"evaluation-with-{domain}.json")
    forest = Forest.open(forest_dir)
    others = [record for record in forest.manifest.elms if record.domain != domain]
    unchanged = all(file_hashes(forest_dir / record.directory) == record.files for record in others)
    return {
        "name": domain,
        "perplexity_before": before.models[_ADDED_ROW].domains[domain].perplexity,
        "perplexity_after": after.models[_ADDED_ROW].domains[domain].perplexity,
        "model": _ADDED_ROW,
        "unchanged": unchanged,
    }
