"""Requests for the workers: one builder per kind of step, from the configuration and the forest as it is now."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from btm.config_ffn import FfnConfig
from btm.config_merge import MergeMethodName
from btm.config_train import BranchOptimizer
from btm.plan import random_split_names
from btm.plan_steps import ROUTERS, Step, StepKind
from btm.records import MergeResult, TrainResult
from btm.requests import (
    MergeInput,
    MergeSpec,
    Part,
    PrepareSpec,
    SpecModel,
    Start,
    TokenSource,
    TrainSpec,
)
from btm.step_context import Context
from btm.step_specs_evaluation import evaluate_spec, score_spec
from btm.step_specs_sparse import expert_train_spec, experts_spec, routers_train_spec, sparse_ffn, upcycled_spec


def build_spec(step: Step, context: Context) -> SpecModel | None:
    """Request for the worker of ``step``; None for steps that take the forest directory alone."""
    builders: dict[StepKind, Callable[[Step, Context], SpecModel]] = {
        StepKind.prepare: _prepare_spec,
        StepKind.train: _train_spec,
        StepKind.score: score_spec,
        StepKind.merge: _merge_spec,
        StepKind.experts: experts_spec,
        StepKind.evaluate: evaluate_spec,
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
