"""Requests that score models and that compare the scores.

Called by :mod:`btm.step_specs`.
"""

from pathlib import Path

from btm.forest import Forest, weights_sha256
from btm.plan import random_split_names
from btm.plan_steps import Step
from btm.records import TRAINING_ROUTING, Ledger, MergeResult, StepResult, TrainResult
from btm.requests import EvaluateSpec, ScoreSource, ScoreSpec
from btm.step_context import Context
from btm.step_specs_sparse import scored_model, sparse_evaluate_spec, training_pass_tokens


def dev_source(domain: str, context: Context) -> ScoreSource:
    """Dev documents of ``domain`` that priors are estimated and soups are judged on."""
    return _score_sources([("dev", domain)], context)[0]


def _score_sources(keys: list[tuple[str, str]], context: Context) -> list[ScoreSource]:
    evaluate, ensemble = context.config.evaluate, context.config.ensemble
    return [
        ScoreSource(
            key=f"{split}-{domain}",
            prefix=context.corpus(domain, split),
            fingerprint=context.domain_info(domain).fingerprint,
            max_tokens=evaluate.max_tokens,
            max_documents=ensemble.prior_documents if split == "dev" else None,
        )
        for split, domain in keys
    ]


def score_spec(step: Step, context: Context) -> ScoreSpec:
    """Request of ``score/<model>``: one model on the test documents, and on dev documents that give priors."""
    config, forest = context.config, context.forest()
    name = step.name.removeprefix("score/")
    everywhere = context.evaluated
    keys = [("test", domain) for domain in everywhere]
    expert = None
    if config.ffn.is_sparse:
        model_dir, sha256, expert = scored_model(name, context)
        keys += [("dev", other) for other in everywhere] if expert else []
    elif name.startswith("branch/"):
        _, domain, elm = name.split("/", 2)
        keys, model_dir, sha256 = [("dev", domain)], forest.directory(elm), weights_sha256(forest.elm(elm))
    elif name.startswith("elm/"):
        domain = name.removeprefix("elm/")
        keys += [("dev", other) for other in everywhere]
        model_dir, sha256 = forest.directory(domain), weights_sha256(forest.elm(domain))
    elif name == "seed":
        assert forest.manifest.seed
        model_dir, sha256 = forest.directory("seed"), weights_sha256(forest.manifest.seed)
    elif name.startswith("average/"):
        model_dir = context.forest_dir / "averages" / name.removeprefix("average/")
        sha256 = MergeResult.load(Path(f"{model_dir}.json")).spec_sha256
        if name.startswith("average/posterior/"):
            keys = [("test", name.removeprefix("average/posterior/"))]
    else:
        result = TrainResult.load(context.run_dir(name) / "result.json")
        model_dir, sha256 = context.run_dir(name) / "model", result.spec_sha256
    as_trained = name == TRAINING_ROUTING or (name == "sparse" and config.ffn.looks_ahead)
    return ScoreSpec(
        root=str(context.forest_dir),
        name=name,
        model_dir=str(model_dir),
        model_sha256=sha256,
        expert=expert,
        routing="training" if as_trained else "causal",
        pass_tokens=training_pass_tokens(context) if as_trained else None,
        sources=_score_sources(keys, context),
        output_dir=str(context.forest_dir / "scores" / name),
        sequence_length=config.evaluate.sequence_length or config.train.sequence_length,
        batch_sequences=config.evaluate.batch_sequences,
        dtype=config.engine.dtype.value,
    )


def evaluate_spec(step: Step, context: Context) -> EvaluateSpec:
    """Request of ``evaluate``: all models that were scored, and the ensemble of the ELMs."""
    if context.config.ffn.is_sparse:
        return sparse_evaluate_spec(context)
    config, forest = context.config, context.forest()
    scores = context.forest_dir / "scores"
    everywhere = context.evaluated
    rows = ["seed", *(["dense"] if config.baselines.dense else []), *(f"elm/{elm}" for elm in forest.domains)]
    rows.append("average/uniform")
    random = random_split_names(context.domains) if config.baselines.random_split else []
    per_domain = {"average/posterior": {d: str(scores / "average/posterior" / d) for d in everywhere}}
    models = {row: str(scores / row) for row in rows}
    random_dirs = [str(scores / name) for name in random]
    return EvaluateSpec(
        root=str(context.forest_dir),
        domains=context.domains,
        novel_domains=context.novel,
        models=models,
        per_domain_models=per_domain,
        elms={elm: str(scores / "elm" / elm) for elm in forest.domains},
        random_split=random_dirs,
        score_results={
            directory: StepResult.load(Path(directory) / "result.json").spec_sha256
            for directory in [*models.values(), *per_domain["average/posterior"].values(), *random_dirs]
        },
        ledgers=_ledgers(context, forest, random),
        test_prefixes={domain: str(context.forest_dir / "corpus" / domain / "test") for domain in everywhere},
        pictured=[domain for domain in everywhere if context.has_pictures(domain)],
        tokenizer_dir=str(forest.tokenizer_dir),
        ensemble=config.ensemble,
        evaluate=config.evaluate,
        sequence_length=config.evaluate.sequence_length or config.train.sequence_length,
        seed=config.seed,
        output=str(context.forest_dir / context.evaluation_name),
    )


def _ledgers(context: Context, forest: Forest, random: list[str]) -> dict[str, Ledger]:
    """Cost of each row, the seed phase included in everything that was branched from it."""
    seed = forest.manifest.seed.ledger if forest.manifest.seed else Ledger()
    ledgers = {"seed": seed} | {
        # An imported model has not been branched from the seed.
        f"elm/{record.domain}": record.ledger if record.origin == "imported" else seed + record.ledger
        for record in forest.manifest.elms
    }
    total = sum((record.ledger for record in forest.manifest.elms), start=seed)
    for row in ("average/uniform", "average/posterior", "ensemble"):
        ledgers[row] = total
    if context.config.baselines.dense:
        ledgers["dense"] = seed + TrainResult.load(context.run_dir("dense") / "result.json").ledger
    if random:
        results = [TrainResult.load(context.run_dir(name) / "result.json").ledger for name in random]
        ledgers["random_split/ensemble"] = sum(results, start=seed)
    return ledgers
