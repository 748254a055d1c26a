"""What a run was expected to show, and whether it did: each relation in words, with figures, also when it fails."""

from collections.abc import Sequence

from btm.evaluate.report_data import ReportData
from btm.evaluate.report_verdicts_compare import Outcome, Verdict, compare, difference, main_ensemble, spread
from btm.evaluate.report_verdicts_sparse import sparse_verdicts
from btm.records import Evaluation, Ledger
from btm.tables import format_count, format_flops, format_perplexity

_BUDGET_TOLERANCE = 0.01
_ADDED_ROW = "ensemble/cached"


def verdicts(data: ReportData) -> list[Verdict]:
    """All relations that the run was expected to show, in order of importance.

    For a forest those that Branch-Train-Merge promises (https://arxiv.org/abs/2208.03306), for a sparse model that it
    beats a dense one. Relations that cannot hold by construction are left out: with one ELM, the ensemble, both
    averages and a dense model are trained alike or the same.
    """
    if data.evaluation is None:
        kind = "sparse model" if data.is_sparse else "ensemble"
        found = [Verdict(f"The {kind} beats one dense model", "not measured", "There is no evaluation.")]
    elif data.is_sparse:
        found = sparse_verdicts(data.evaluation)
    else:
        found = [] if _is_single(data.evaluation) else _forest_verdicts(data.evaluation)
    return [*found, *_additions(data)]


def headline(found: Sequence[Verdict]) -> str:
    """One sentence on all verdicts."""
    measured = [verdict for verdict in found if verdict.outcome != "not measured"]
    failed = [verdict for verdict in measured if verdict.outcome == "fails"]
    unknown = len(found) - len(measured)
    rest = f" {unknown} {'was' if unknown == 1 else 'were'} not measured." if unknown else ""
    if not found:
        return "The run has one expert, so that no relation between experts is expected of it."
    if not measured:
        return "None of the expected relations was measured."
    if failed:
        return f"{len(failed)} of {len(measured)} measured relations fail.{rest}"
    if len(measured) == 1:
        return f"The one measured relation holds.{rest}"
    return f"All {len(measured)} measured relations hold.{rest}"


def _forest_verdicts(evaluation: Evaluation) -> list[Verdict]:
    ensemble = main_ensemble(evaluation)
    return [
        compare(
            evaluation,
            "The ensemble of ELMs beats one dense model of the same budget",
            (ensemble, "dense"),
            "switch on the dense baseline (baselines.dense=true)",
        ),
        compare(
            evaluation,
            "ELMs of domains beat ELMs of a random split of the same documents",
            (ensemble, "random_split/ensemble"),
            "switch on the random-split baseline (baselines.random_split=true)",
        ),
        compare(
            evaluation,
            "The average weighted by the posterior beats the uniform average",
            ("average/posterior", "average/uniform"),
            "both averages must be evaluated",
        ),
        _specialisation(evaluation),
        _equal_budget(evaluation, ensemble),
    ]


def _is_single(evaluation: Evaluation) -> bool:
    return sum(name.startswith("elm/") for name in evaluation.models) == 1


def _specialisation(evaluation: Evaluation) -> Verdict:
    claim = "Every ELM is the best ELM on its own domain"
    elms = [name for name in evaluation.models if name.startswith("elm/")]
    own = [domain for domain in evaluation.domains if f"elm/{domain}" in elms]
    if not own:
        return Verdict(claim, "not measured", "No ELM was evaluated on its own domain.")
    losers = []
    for domain in own:
        scores = {
            name: evaluation.models[name].domains[domain].perplexity
            for name in elms
            if domain in evaluation.models[name].domains
        }
        if scores and min(scores, key=lambda name: scores[name]) != f"elm/{domain}":
            losers.append(domain)
    if losers:
        return Verdict(claim, "fails", f"Another ELM reads {', '.join(losers)} better ({len(losers)} of {len(own)}).")
    return Verdict(claim, "holds", f"It is on all {len(own)} domains.")


def _equal_budget(evaluation: Evaluation, ensemble: str) -> Verdict:
    claim = "The compared models had equal budgets"
    ledgers = {name: _ledger(evaluation, name) for name in (ensemble, "dense", "random_split/ensemble")}
    known = {name: ledger for name, ledger in ledgers.items() if ledger is not None}
    if len(known) < 2:
        return Verdict(claim, "not measured", "Fewer than two of the compared models have a ledger.")
    text = "; ".join(
        f"{name} {format_count(ledger.tokens)} tokens, {format_flops(ledger.flops)} FLOPs"
        for name, ledger in known.items()
    )
    widest = max(
        spread([float(ledger.tokens) for ledger in known.values()]), spread([le.flops for le in known.values()])
    )
    outcome: Outcome = "holds" if widest <= _BUDGET_TOLERANCE else "fails"
    return Verdict(claim, outcome, f"{text}. They differ by {100 * widest:.2g} % at most (1 % is allowed).")


def _ledger(evaluation: Evaluation, name: str) -> Ledger | None:
    scores = evaluation.models.get(name)
    return scores.ledger if scores and scores.ledger and scores.ledger.tokens else None


def _additions(data: ReportData) -> list[Verdict]:
    recorded = data.summary.get("added_domain") or []
    entries = recorded if isinstance(recorded, list) else [recorded]
    by_name = {str(entry["name"]): entry for entry in entries if isinstance(entry, dict) and "name" in entry}
    return [_addition(data, name, by_name.get(name, {})) for name in dict.fromkeys([*data.later, *by_name])]


def _addition(data: ReportData, domain: str, recorded: dict[str, object]) -> Verdict:
    claim = f"The forest reads {domain} better once it has an ELM for it"
    row = str(recorded.get("model", _ADDED_ROW))
    before = _perplexity(data.evaluation, row, domain) or recorded.get("perplexity_before")
    after = _perplexity(data.later.get(domain), row, domain) or recorded.get("perplexity_after")
    if not isinstance(before, int | float) or not isinstance(after, int | float):
        return Verdict(claim, "not measured", f"{row} was not measured on {domain} both before and after it joined.")
    unchanged = recorded.get("unchanged")
    files = "" if unchanged is None else " The files of all other ELMs are byte-identical to what they were."
    if unchanged is False:
        files = " The files of other ELMs CHANGED, which must not happen."
    finding = (
        f"Perplexity of {row} on {domain}: {format_perplexity(before)} before, {format_perplexity(after)} after, "
        f"{difference(after, before)}.{files}"
    )
    holds = after < before and unchanged is not False
    return Verdict(claim, "holds" if holds else "fails", finding)


def _perplexity(evaluation: Evaluation | None, row: str, domain: str) -> float | None:
    scores = evaluation.models.get(row) if evaluation else None
    return scores.domains[domain].perplexity if scores and domain in scores.domains else None
