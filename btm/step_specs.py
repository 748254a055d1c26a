"""Requests for the workers: one builder per kind of step, from the configuration and the forest as it is now."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from btm.config_ffn import FfnConfig
from btm.config_merge import MergeMethodName
from btm.config_train import BranchOptimizer
from btm.forest import Forest, weights_sha256
from btm.plan import ROUTERS, Step, StepKind, random_split_names
from btm.records import TRAINING_ROUTING, Ledger, MergeResult, StepResult, TrainResult
from btm.requests import (
    EvaluateSpec,
    MergeInput,
    MergeSpec,
    Part,
    PrepareSpec,
    ScoreSource,
    ScoreSpec,
    SpecModel,
    Start,
    TokenSource,
    TrainSpec,
)
from btm.step_context import Context
from btm.step_specs_sparse import (
    expert_train_spec,
    experts_spec,
    routers_train_spec,
    scored_model,
    sparse_evaluate_spec,
    sparse_ffn,
    training_pass_tokens,
    upcycled_spec,
)


def build_spec(step: Step, context: Context) -> SpecModel | None:
    """Request for the worker of ``step``; None for steps that take the forest directory alone."""
    builders: dict[StepKind, Callable[[Step, Context], SpecModel]] = {
        StepKind.prepare: _prepare_spec,
        StepKind.train: _train_spec,
        StepKind.score: _score_spec,
        StepKind.merge: _merge_spec,
        StepKind.experts: experts_spec,
        StepKind.evaluate: _evaluate_spec,
    }
    builder = builders.get(step.kind)
    return builder(step, context) if builder else None


def _prepare_spec(step: Step, context: Context) -> PrepareSpec:
    data = context.config.data
    if step.name != "prepare":
        domain = step.name.removeprefix("prepare/")
        path = data.path or data.add_later.get(domain) or data.novel.get(domain)
        later = {domain: path} if path else {}
        data = data.model_copy(
            update={"domains": later, "novel": {}, "add_later": {}, "path": None, "local_text": not later}
        )
    return PrepareSpec(
        root=str(context.forest_dir),
        output_dir=str(context.forest_dir / "corpus"),
        tokenizer_dir=str(context.forest_dir / "tokenizer"),
        pretrained_dir=context.config.tokenizer.path or context.config.model.path,
        data=data,
        tokenizer=context.config.tokenizer,
        seed=context.config.seed,
    )


def _source(domain: str, split: str, context: Context, *, weight: float = 1.0, part: Part | None = None) -> TokenSource:
    return TokenSource(
        domain=domain,
        prefix=context.corpus(domain, split),
        weight=weight,
        part=part,
        fingerprint=context.domain_info(domain).fingerprint,
    )


def _train_spec(step: Step, context: Context) -> TrainSpec:
    if step.name.startswith("expert/"):
        return expert_train_spec(step, context)
    if step.name == ROUTERS:
        return routers_train_spec(_train_spec(replace(step, name="sparse"), context), context)
    config, updates = context.config, context.updates
    start = _start(step, context)
    whole = step.name in ("seed", "dense", "sparse")
    first, last, total = updates.seed, updates.total, updates.total
    if config.ffn.is_sparse:
        first = 0
    elif step.name == "seed":
        first, last = 0, updates.seed
    elif start.kind == "weights":
        first, last, total = 0, updates.elm, max(1, updates.elm)
    spec = TrainSpec(
        root=str(context.forest_dir),
        name=step.name,
        output_dir=str(context.run_dir(step.name)),
        start=start,
        sources=_train_sources(step.name, context),
        dev=_dev_sources(step.name, context),
        first_update=first,
        last_update=last,
        total_updates=total,
        batch_sequences=updates.batch_sequences if whole else updates.elm_batch_sequences,
        tokenizer_dir=str(context.forest_dir / "tokenizer"),
        model=config.model,
        ffn=sparse_ffn(config.ffn) if step.name == "sparse" else FfnConfig(),
        train=config.train,
        engine=config.engine,
        seed=config.seed,
    )
    return upcycled_spec(spec, config.ffn.upcycle_from) if step.name == "sparse" and config.ffn.upcycle_from else spec


def _start(step: Step, context: Context) -> Start:
    """Where the weights come from; an optimizer that starts anew gets a schedule of its own."""
    config, name = context.config, step.name
    if name == "seed" or config.ffn.is_sparse:
        return Start(kind="weights" if config.model.path else "scratch", path=config.model.path)
    domain = name.removeprefix("elm/") if name.startswith("elm/") else None
    if f"branch/{domain}" in step.needs:
        model = context.run_dir(f"branch/{domain}") / "model"
        return Start(kind="weights", path=str(model), sha256=MergeResult.load(Path(f"{model}.json")).spec_sha256)
    seed = TrainResult.load(context.run_dir("seed") / "result.json").spec_sha256
    if domain and config.branch.optimizer is BranchOptimizer.reset:
        return Start(kind="weights", path=str(context.forest_dir / "seed"), sha256=seed)
    return Start(kind="checkpoint", path=str(context.run_dir("seed")), sha256=seed)


def _train_sources(name: str, context: Context) -> list[TokenSource]:
    data = context.config.data
    domain = name.removeprefix("elm/")
    if name.startswith("elm/") and not data.seed_data_fraction:
        # Without a look at the others: there may be a thousand, and this is done for each of them.
        return [_source(domain, "train", context)]
    mixture = [_source(d, "train", context, weight=data.weights.get(d, 1.0)) for d in context.domains]
    if name in ("seed", "dense", "sparse"):
        return mixture
    if name.startswith("random/"):
        names = random_split_names(context.domains)
        part = Part(index=names.index(name), count=len(names))
        return [source.model_copy(update={"part": part}) for source in mixture]
    own = _source(domain, "train", context, weight=1 - data.seed_data_fraction)
    total = sum(source.weight for source in mixture)
    shared = [s.model_copy(update={"weight": s.weight / total * data.seed_data_fraction}) for s in mixture]
    others = [source for source in shared if source.domain != own.domain]
    kept = sum(source.weight for source in shared if source.domain == own.domain)
    return [own.model_copy(update={"weight": own.weight + kept}), *others]


def _dev_sources(name: str, context: Context) -> list[TokenSource]:
    own = [name.removeprefix("elm/")] if name.startswith("elm/") else context.domains
    return [_source(domain, "dev", context) for domain in own]


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


def _score_spec(step: Step, context: Context) -> ScoreSpec:
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


def _merge_spec(step: Step, context: Context) -> MergeSpec:
    forest, kind = context.forest(), step.name.split("/")[0]
    scores = context.forest_dir / "scores"
    if kind == "branch":
        domain = step.name.removeprefix("branch/")
        method = context.config.branch.source.value
        output = context.run_dir(step.name) / "model"
        score_dirs = {elm: str(scores / "branch" / domain / elm) for elm in forest.domains}
    else:
        _, method, *rest = step.name.split("/")
        domain = rest[0] if rest else None
        output = context.forest_dir / "averages" / step.name.removeprefix("average/")
        score_dirs = {elm: str(scores / "elm" / elm) for elm in forest.domains}
    return MergeSpec(
        root=str(context.forest_dir),
        name=step.name,
        method=MergeMethodName(method),
        models=[
            MergeInput(
                name=record.domain,
                directory=str(context.forest_dir / record.directory),
                files=record.files,
                checksums=record.checksums,
                score_dir=score_dirs[record.domain] if domain else None,
            )
            for record in forest.manifest.elms
        ],
        domain=domain,
        tokenizer_dir=str(forest.tokenizer_dir),
        output_dir=str(output),
        memory_bytes=context.config.merge.memory_bytes,
    )


def _evaluate_spec(step: Step, context: Context) -> EvaluateSpec:
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
