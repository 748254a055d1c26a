"""Relations that a sparse model was expected to show against a dense one of equal tokens."""

from btm.evaluate.report_verdicts_compare import Outcome, Verdict, compare, main_ensemble, spread
from btm.records import TRAINING_ROUTING, Evaluation
from btm.tables import format_count, format_flops

_TOKEN_TOLERANCE = 0.01
_REMEDY = "switch on the dense baseline (baselines.dense=true)"


def sparse_verdicts(evaluation: Evaluation) -> list[Verdict]:
    """Relations of a sparse run, in order of importance.

    A DEMix model (https://arxiv.org/abs/2108.05036) is read with the domain of each document known, and as the mixture
    of its domains' models. With one domain it has one expert and is the dense model, so nothing is expected of it.
    """
    is_mixed = any(name.startswith("ensemble/") for name in evaluation.models)
    if is_mixed and len(evaluation.domains) < 2:
        return []
    known = ", the domain of each document being known," if is_mixed else ""
    found = [compare(evaluation, f"The sparse model{known} beats the dense model", ("sparse", "dense"), _REMEDY)]
    if is_mixed:
        claim = "The mixture of the DEMix model's domains, the domain unknown, beats the dense model"
        found.append(compare(evaluation, claim, (main_ensemble(evaluation), "dense"), _REMEDY))
    return [*found, _equal_tokens(evaluation)]


def _equal_tokens(evaluation: Evaluation) -> Verdict:
    claim = "The sparse and the dense model were trained on equally many tokens"
    # Without what auxiliary routers cost that learned after the model.
    sparse = evaluation.models.get(TRAINING_ROUTING) or evaluation.models.get("sparse")
    rows = {"sparse": sparse, "dense": evaluation.models.get("dense")}
    ledgers = {name: row.ledger for name, row in rows.items() if row and row.ledger and row.ledger.tokens}
    if len(ledgers) < 2:
        return Verdict(claim, "not measured", "Not both of them have a ledger.")
    text = "; ".join(
        f"{name} {format_count(ledger.tokens)} tokens, {format_flops(ledger.flops)} FLOPs"
        for name, ledger in ledgers.items()
    )
    tokens = spread([float(ledger.tokens) for ledger in ledgers.values()])
    flops = spread([ledger.flops for ledger in ledgers.values()])
    outcome: Outcome = "holds" if tokens <= _TOKEN_TOLERANCE else "fails"
    finding = (
        f"{text}. Their tokens differ by {100 * tokens:.2g} % (1 % is allowed), their FLOPs by {100 * flops:.2g} %."
    )
    return Verdict(claim, outcome, finding)
