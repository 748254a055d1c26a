"""Requests of a run that trains one sparse model instead of a forest, and of domains that join it later.

Called by :mod:`btm.step_specs`.
"""

from pathlib import Path

from btm.config_ffn import FfnConfig, FfnLayer
from btm.plan_sparse import router_updates, sparse_score_names
from btm.plan_steps import ROUTERS, Step
from btm.records import TRAINING_ROUTING, Ledger, StepResult, TrainResult
from btm.requests import EvaluateSpec, ScoreSource, Start, TokenSource, TrainSpec
from btm.sparse_models import DomainExperts, ExpertsResult, ExpertsSpec, SparseModels
from btm.step_context import Context
from btm.upcycle_seed import UpcycleSeed

MODELS = ("sparse", "dense")
"""Trainings of such a run."""
_CAUSAL = "each token is routed by itself (auxiliary routers): what generates"
_AS_TRAINED = "experts choose among all tokens of a pass, as in training: looks ahead, cannot generate"


def scored_model(name: str, context: Context) -> tuple[Path, str, str | None]:
    """The model that a score step reads.

    Args:
        name: ``sparse``, with either of its routings, ``sparse/<domain>`` or ``dense``.
        context: Of the run.

    Returns:
        Its directory, a hash of what it is, and the domain whose experts are taken.

    Raises:
        ForestError: If the domain has left the model.
    """
    model, _, domain = name.partition("/")
    if name == TRAINING_ROUTING:
        domain = ""
    elif name == "sparse" and context.config.ffn.auxiliary_tokens:
        model = ROUTERS
    if domain:
        models = SparseModels.open(context.forest_dir)
        return models.directory, models.experts(domain).weights, domain
    result = TrainResult.load(context.run_dir(model) / "result.json")
    return context.run_dir(model) / "model", result.spec_sha256, None


def experts_spec(step: Step, context: Context) -> ExpertsSpec:
    """Request of the steps ``branch/<domain>``, before new experts are trained, and ``grow/<domain>``, after it."""
    kind, domain = step.name.split("/", 1)
    models, config = SparseModels.open(context.forest_dir), context.config
    spec = ExpertsSpec(
        root=str(context.forest_dir),
        action="branch",
        domain=domain,
        model_dir=str(models.directory),
        experts=models.manifest.experts,
        tokenizer_dir=str(context.forest_dir / "tokenizer"),
        output_dir=str(context.run_dir(step.name) / "model"),
    )
    if kind == "grow":
        new = trained_experts(domain, context)
        trained = {
            "action": "join",
            "trained_dir": str(context.run_dir(f"expert/{domain}") / "model"),
            "trained_sha256": new.weights,
            "output_dir": str(models.directory_for(models.with_domain(new))),
        }
        return spec.model_copy(update=trained)
    dev = ScoreSource(
        key=f"dev-{domain}",
        prefix=context.corpus(domain, "dev"),
        fingerprint=context.domain_info(domain).fingerprint,
        max_tokens=config.evaluate.max_tokens,
        max_documents=config.branch.sample_documents,
    )
    length = config.evaluate.sequence_length or config.train.sequence_length
    batch = config.evaluate.batch_sequences
    return spec.model_copy(update={"dev": dev, "sequence_length": length, "batch_sequences": batch})


def expert_train_spec(step: Step, context: Context) -> TrainSpec:
    """Request of ``expert/<domain>``: as many tokens as each of the first domains had, all but its experts frozen."""
    config, updates = context.config, context.updates
    domain = step.name.removeprefix("expert/")
    start = context.run_dir(f"branch/{domain}") / "model"
    train, dev = (
        TokenSource(
            domain=domain,
            prefix=context.corpus(domain, split),
            fingerprint=context.domain_info(domain).fingerprint,
        )
        for split in ("train", "dev")
    )
    return TrainSpec(
        root=str(context.forest_dir),
        name=step.name,
        output_dir=str(context.run_dir(step.name)),
        # What the copies are of, not how they were chosen: other domains may come and go before this goes on.
        start=Start(kind="weights", path=str(start), sha256=ExpertsResult.load(Path(f"{start}.json")).weights),
        sources=[train],
        dev=[dev],
        last_update=updates.total,
        total_updates=updates.total,
        batch_sequences=updates.elm_batch_sequences,
        tokenizer_dir=str(context.forest_dir / "tokenizer"),
        model=config.model,
        ffn=config.ffn,
        trainable_domain=domain,
        train=config.train,
        # A single expert per layer, which nobody has to share out.
        engine=config.engine.model_copy(update={"expert_parallel": 1}),
        seed=config.seed,
    )


def sparse_ffn(ffn: FfnConfig) -> FfnConfig:
    """Expert layers of the training ``sparse``: without what only its beginning or its auxiliary routers need."""
    changes: dict[str, object] = {"upcycle_from": None, "auxiliary_tokens": 0}
    if ffn.auxiliary_tokens:
        changes["auxiliary_weight"] = 0.0
    if ffn.is_noisy is None:
        changes["is_noisy"] = ffn.upcycle_from is not None
    return ffn.model_copy(update=changes)


def upcycled_spec(spec: TrainSpec, path: str) -> TrainSpec:
    """The training ``spec`` beginning with a model of one expert per modality, behind the documents that it has read.

    Raises:
        ForestError: If there is no such model at ``path``.
    """
    seed = UpcycleSeed.find(path)
    read = seed.batches_read(spec.sources, spec.batch_sequences * spec.train.sequence_length)
    start = Start(kind="upcycle", path=str(seed.directory), sha256=seed.sha256)
    return spec.model_copy(update={"start": start, "first_batch": read})


def routers_train_spec(sparse: TrainSpec, context: Context) -> TrainSpec:
    """Request of ``routers``: the auxiliary routers of the finished model ``sparse`` learn, all else is frozen.

    Args:
        sparse: Request of that training; the documents come in another order.
        context: Of the run.
    """
    updates = router_updates(context.config, context.updates)
    changes = {
        "name": ROUTERS,
        "output_dir": str(context.run_dir(ROUTERS)),
        "start": Start(kind="weights", path=str(context.run_dir("sparse") / "model"), sha256=sparse.sha256),
        "first_update": 0,
        "last_update": updates,
        "total_updates": updates,
        "ffn": sparse.ffn.model_copy(update={"auxiliary_weight": context.config.ffn.auxiliary_weight}),
        "first_batch": 0,
        "trains_auxiliary_only": True,
        "seed": sparse.seed + 1,
    }
    return sparse.model_copy(update=changes)


def training_pass_tokens(context: Context) -> int:
    """Tokens among which experts choose in one forward pass of a training on one process."""
    sequences = context.config.train.micro_batch_sequences or context.updates.batch_sequences
    return min(sequences, context.updates.batch_sequences) * context.config.train.sequence_length


def trained_experts(domain: str, context: Context) -> DomainExperts:
    """What the finished step ``expert/<domain>`` made."""
    result = TrainResult.load(context.run_dir(f"expert/{domain}") / "result.json")
    branch = ExpertsResult.load(context.run_dir(f"branch/{domain}") / "model.json")
    return DomainExperts(
        domain=domain,
        weights=f"{result.spec_sha256}/{domain}",
        ancestors=branch.ancestors,
        ledger=result.ledger,
    )


def sparse_evaluate_spec(context: Context) -> EvaluateSpec:
    """Rows ``sparse``, with each of its routings, and ``dense``; of DEMix the mixtures of its domains' models, too.

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
        notes=_notes(config.ffn),
        test_prefixes={domain: context.corpus(domain, "test") for domain in everywhere},
        pictured=[domain for domain in everywhere if context.has_pictures(domain)],
        tokenizer_dir=str(context.forest_dir / "tokenizer"),
        ensemble=config.ensemble,
        evaluate=config.evaluate,
        sequence_length=config.evaluate.sequence_length or config.train.sequence_length,
        seed=config.seed,
        output=str(context.forest_dir / context.evaluation_name),
    )


def _notes(ffn: FfnConfig) -> dict[str, str]:
    if ffn.has_two_routings:
        return {"sparse": _CAUSAL, TRAINING_ROUTING: _AS_TRAINED}
    return {"sparse": _AS_TRAINED} if ffn.looks_ahead else {}


def _ledgers(context: Context) -> dict[str, Ledger]:
    found = {
        name: TrainResult.load(context.run_dir(name) / "result.json").ledger
        for name in MODELS
        if name == "sparse" or context.config.baselines.dense
    }
    if context.config.ffn.layer is FfnLayer.demix:
        later = [experts.ledger for experts in SparseModels.open(context.forest_dir).manifest.experts]
        found["sparse"] = sum(later, start=found["sparse"])
    if upcycled := context.config.ffn.upcycle_from:
        found["sparse"] += UpcycleSeed.find(upcycled).ledger
    found |= {"ensemble": found["sparse"], TRAINING_ROUTING: found["sparse"]}
    if context.config.ffn.auxiliary_tokens:
        found["sparse"] += TrainResult.load(context.run_dir(ROUTERS) / "result.json").ledger
    return found
