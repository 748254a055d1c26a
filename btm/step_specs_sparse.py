"""Requests of a run that trains one sparse model instead of a forest; called by :mod:`btm.step_specs`."""

from pathlib import Path

from btm.config_ffn import FfnLayer
from btm.plan import sparse_score_names
from btm.records import Ledger, StepResult, TrainResult
from btm.requests import EvaluateSpec
from btm.step_context import Context

MODELS = ("sparse", "dense")
"""Trainings of such a run."""


def scored_model(name: str, context: Context) -> tuple[Path, str, str | None]:
    """The model that a score step reads.

    Args:
        name: ``sparse``, ``sparse/<domain>`` or ``dense``.
        context: Of the run.

    Returns:
        Its directory, a hash of what it is, and the domain whose experts are taken.
    """
    model, _, domain = name.partition("/")
    result = TrainResult.load(context.run_dir(model) / "result.json")
    return context.run_dir(model) / "model", f"{result.spec_sha256}/{domain}".rstrip("/"), domain or None


def sparse_evaluate_spec(context: Context) -> EvaluateSpec:
    """Rows ``sparse`` and ``dense``; of a DEMix model also the mixtures of its domains' models.

    The row ``sparse`` of a DEMix model is with the domain known, so it is absent on domains without experts.
    """
    config, scores = context.config, context.forest_dir / "scores"
    domains, everywhere = context.domains, context.evaluated
    baselines = {"dense": str(scores / "dense")} if config.baselines.dense else {}
    names = sparse_score_names(config, domains)
    directories = {name: str(scores / name) for name in names}
    is_demix = config.ffn.layer is FfnLayer.demix
    by_domain = {domain: directories[f"sparse/{domain}"] for domain in domains} if is_demix else {}
    return EvaluateSpec(
        root=str(context.forest_dir),
        domains=domains,
        novel_domains=context.novel,
        models=baselines if is_demix else directories | baselines,
        per_domain_models={"sparse": by_domain} if is_demix else {},
        elms=by_domain,
        score_results={
            directory: StepResult.load(Path(directory) / "result.json").spec_sha256
            for directory in [*directories.values(), *baselines.values()]
        },
        ledgers=_ledgers(context),
        test_prefixes={domain: context.corpus(domain, "test") for domain in everywhere},
        tokenizer_dir=str(context.forest_dir / "tokenizer"),
        ensemble=config.ensemble,
        evaluate=config.evaluate,
        sequence_length=config.evaluate.sequence_length or config.train.sequence_length,
        seed=config.seed,
        output=str(context.forest_dir / context.evaluation_name),
    )


def _ledgers(context: Context) -> dict[str, Ledger]:
    found = {
        name: TrainResult.load(context.run_dir(name) / "result.json").ledger
        for name in MODELS
        if name == "sparse" or context.config.baselines.dense
    }
    return found | {"ensemble": found["sparse"]}
