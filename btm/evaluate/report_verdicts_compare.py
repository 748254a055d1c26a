"""What verdicts are made of: a relation with its outcome, and the comparison of two rows of an evaluation."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from btm.records import Evaluation
from btm.tables import format_perplexity, mean_perplexity

Outcome = Literal["holds", "fails", "not measured"]


@dataclass(frozen=True, slots=True)
class Verdict:
    """One expected relation."""

    claim: str
    outcome: Outcome
    finding: str
    """One or two sentences with figures."""


def main_ensemble(evaluation: Evaluation) -> str:
    """Row of the ensemble that is compared: the uniform prior's where it was measured, which no dev data entered."""
    rows = [name for name in evaluation.models if name.startswith("ensemble/")]
    return "ensemble/uniform" if "ensemble/uniform" in rows or not rows else rows[0]


def compare(evaluation: Evaluation, claim: str, rows: tuple[str, str], remedy: str) -> Verdict:
    """Whether the first of two rows has the lower perplexity, averaged over the trained domains.

    Args:
        evaluation: What was measured.
        claim: In words.
        rows: The better and the worse by expectation.
        remedy: What to do where a row is absent.
    """
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
        f"{format_perplexity(right)}, {difference(left, right)}. {better} is lower on {wins} of "
        f"{len(evaluation.domains)} domains; on {clear} of them the 95 % intervals do not overlap."
    )
    return Verdict(claim, "holds" if left < right else "fails", finding)


def difference(left: float, right: float) -> str:
    """How much lower or higher ``left`` is, in per cent of ``right``."""
    percent = 100 * (left - right) / right
    return f"{abs(percent):.1f} % {'lower' if percent < 0 else 'higher'}" if percent else "equal"


def _wins(evaluation: Evaluation, better: str, worse: str) -> tuple[int, int]:
    wins = clear = 0
    for domain in evaluation.domains:
        left, right = evaluation.models[better].domains[domain], evaluation.models[worse].domains[domain]
        wins += left.perplexity < right.perplexity
        clear += left.high < right.low
    return wins, clear


def spread(values: Sequence[float]) -> float:
    """Largest minus smallest value as a share of the largest."""
    return (max(values) - min(values)) / max(values) if max(values) > 0 else 0.0
