"""What a run was expected to show, and whether it did: each relation in words, with figures, also when it fails."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from btm.evaluate.report_data import ReportData
from btm.records import Evaluation, Ledger
from btm.tables import format_count, format_flops, format_perplexity, mean_perplexity

_BUDGET_TOLERANCE = 0.01
_ADDED_ROW = "ensemble/cached"

Outcome = Literal["holds", "fails", "not measured"]


@dataclass(frozen=True, slots=True)
class Verdict:
    """One expected relation."""

    claim: str
    outcome: Outcome
    finding: str
    """One or two sentences with figures."""


def verdicts(data: ReportData) -> list[Verdict]:
    """All relations that Branch-Train-Merge promises (https://arxiv.org/abs/2208.03306), in order of importance."""
    found = []
    if data.evaluation is None:
        found.append(Verdict("The ensemble beats one dense model", "not measured", "There is no evaluation."))
    else:
        ensemble = main_ensemble(data.evaluation)
        found += [
            _compare(
                data.evaluation,
                "The ensemble of ELMs beats one dense model of the same budget",
                (ensemble, "dense"),
                "switch on the dense baseline (baselines.dense=true)",
            ),
            _compare(
                data.evaluation,
                "ELMs of domains beat ELMs of a random split of the same documents",
                (ensemble, "random_split/ensemble"),
                "switch on the random-split baseline (baselines.random_split=true)",
            ),
            _compare(
                data.evaluation,
                "The average weighted by the posterior beats the uniform average",
                ("average/posterior", "average/uniform"),
                "both averages must be evaluated",
            ),
            _specialisation(data.evaluation),
            _equal_budget(data.evaluation, ensemble),
        ]
    return [*found, *_additions(data)]


def main_ensemble(evaluation: Evaluation) -> str:
    """Row of the ensemble that is compared: the uniform prior's where it was measured, which no dev data entered."""
    rows = [name for name in evaluation.models if name.startswith("ensemble/")]
    return "ensemble/uniform" if "ensemble/uniform" in rows or not rows else rows[0]


def headline(found: Sequence[Verdict]) -> str:
    """One sentence on all verdicts."""
    measured = [verdict for verdict in found if verdict.outcome != "not measured"]
    failed = [verdict for verdict in measured if verdict.outcome == "fails"]
    unknown = len(found) - len(measured)
    rest = f" {unknown} {'was' if unknown == 1 else 'were'} not measured." if unknown else ""
    if not measured:
        return "None of the expected relations was measured."
    if failed:
        return f"{len(failed)} of {len(measured)} measured relations fail.{rest}"
    if len(measured) == 1:
        return f"The one measured relation holds.{rest}"
    return f"All {len(measured)} measured relations hold.{rest}"


def _compare(evaluation: Evaluation, claim: str, rows: tuple[str, str], remedy: str) -> Verdict:
    better, worse = rows
    absent = [name for name in rows if name not in evaluation.models]
    if absent:
        return Verdict(claim, "not measured", f"There is no row {' and no row '.join(absent)}; {remedy}.")
    left = mean_perplexity(evaluation.models[better], evaluation.domains)
    right = mean_perplexity(evaluation.models[worse], evaluation.domains)
    if left is None or right is None:
        return Verdict(claim, "not measured", f"{better} and {worse} were not both measured on every domain.")
    wins, clear = _wins(evaluation, better, worse)
    finding = (
        f"Mean perplexity over {len(evaluation.domains)} domains: {better} {format_perplexity(left)}, {worse} "
        f"{format_perplexity(right)}, {_difference(left, right)}. {better} is lower on {wins} of "
        f"{len(evaluation.domains)} domains; on {clear} of them the 95 % intervals do not overlap."
    )
    return Verdict(claim, "holds" if left < right else "fails", finding)


def _difference(left: float, right: float) -> str:
    percent = 100 * (left - right) / right
    return f"{abs(percent):.1f} % {'lower' if percent < 0 else 'higher'}" if percent else "equal"


def _wins(evaluation: Evaluation, better: str, worse: str) -> tuple[int, int]:
    wins = clear = 0
    for domain in evaluation.domains:
        left, right = evaluation.models[better].domains[domain], evaluation.models[worse].domains[domain]
        wins += left.perplexity < right.perplexity
        clear += left.high < right.low
    return wins, clear


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
    spread = max(
        _spread([float(ledger.tokens) for ledger in known.values()]), _spread([le.flops for le in known.values()])
    )
    outcome: Outcome = "holds" if spread <= _BUDGET_TOLERANCE else "fails"
    return Verdict(claim, outcome, f"{text}. They differ by {100 * spread:.2g} % at most (1 % is allowed).")


def _ledger(evaluation: Evaluation, name: str) -> Ledger | None:
    scores = evaluation.models.get(name)
    return scores.ledger if scores and scores.ledger and scores.ledger.tokens else None


def _spread(values: Sequence[float]) -> float:
    return (max(values) - min(values)) / max(values) if max(values) > 0 else 0.0


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
        f"{_difference(after, before)}.{files}"
    )
    holds = after < before and unchanged is not False
    return Verdict(claim, "holds" if holds else "fails", finding)


def _perplexity(evaluation: Evaluation | None, row: str, domain: str) -> float | None:
    scores = evaluation.models.get(row) if evaluation else None
    return scores.domains[domain].perplexity if scores and domain in scores.domains else None
