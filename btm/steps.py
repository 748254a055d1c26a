"""When a step is finished, and what its end means for the forest."""

import datetime
from pathlib import Path

from btm.errors import ForestError
from btm.files import read_json
from btm.forest import Forest
from btm.plan_steps import Step, StepKind
from btm.records import ElmRecord, MergeResult, Parent, PrepareResult, TrainResult
from btm.requests import EvaluateSpec, MergeSpec, PrepareSpec, ScoreSpec, SpecModel, TrainSpec
from btm.sparse_models import ExpertsSpec, SparseModels
from btm.step_context import Context
from btm.step_specs_sparse import trained_experts

MODULES = {
    StepKind.prepare: "btm.corpus.worker",
    StepKind.train: "btm.train.worker",
    StepKind.score: "btm.evaluate.score",
    StepKind.merge: "btm.merge.worker",
    StepKind.experts: "btm.train.experts_worker",
    StepKind.evaluate: "btm.evaluate.worker",
    StepKind.report: "btm.evaluate.report",
}
"""Kind of step -> module that runs it as ``python -m <module> <spec.json>``; ``join`` is done by the driver."""

EXIT_PREEMPTED = 143
"""Exit code (128 + TERM) of a training worker that was asked to stop and has written a checkpoint."""


def is_finished(step: Step, spec: SpecModel | None, context: Context) -> bool:
    """Whether the result of ``step`` is there and answers exactly ``spec``."""
    if step.kind is StepKind.joining:
        return step.name.removeprefix("join/") in _present(context)
    if spec is None:
        return False
    path = _result_path(step, spec)
    if not path.is_file():
        return False
    try:
        return read_json(path).get("spec_sha256") == spec.sha256
    except (ForestError, AttributeError):
        return False


def register(step: Step, context: Context) -> None:
    """Let a finished step change the forest: a corpus makes it, a seed model and new ELMs join it."""
    if step.kind is StepKind.prepare:
        result = PrepareResult.load(context.forest_dir / "corpus" / "prepare.json")
        Forest.create(
            context.forest_dir,
            name=context.config.name,
            tokenizer_sha256=result.tokenizer_sha256,
            vocab_size=result.vocab_size,
        )
    elif step.name == "seed":
        result = TrainResult.load(context.run_dir("seed") / "result.json")
        record = _record("seed", result, [], "-")
        context.forest().set_seed(record, context.run_dir("seed") / "model")
    elif step.kind is StepKind.joining:
        _join(step.name.removeprefix("join/"), context)


def _present(context: Context) -> list[str]:
    """Domains with an ELM, or with experts of their own."""
    if context.config.ffn.is_sparse:
        return SparseModels.open(context.forest_dir).domains
    return context.forest().domains


def _join(domain: str, context: Context) -> None:
    if context.config.ffn.is_sparse:
        models = SparseModels.open(context.forest_dir)
        models.publish(models.with_domain(trained_experts(domain, context)))
        return
    forest = context.forest()
    result = TrainResult.load(context.run_dir(f"elm/{domain}") / "result.json")
    parents = _parents(domain, context)
    record = _record(domain, result, parents, context.domain_info(domain).fingerprint)
    record = record.model_copy(update={"ancestors": forest.ancestors(parents)})
    forest.join(record, context.run_dir(f"elm/{domain}") / "model", order=context.domains)


def _record(domain: str, result: TrainResult, parents: list[Parent], fingerprint: str) -> ElmRecord:
    return ElmRecord(
        domain=domain,
        directory="",
        parents=parents,
        ledger=result.ledger,
        data_fingerprint=fingerprint,
        files={},
        num_parameters=result.num_parameters,
        dev_loss=result.dev_loss,
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    )


def _parents(domain: str, context: Context) -> list[Parent]:
    branched = context.run_dir(f"branch/{domain}") / "model"
    start = TrainSpec.load(context.run_dir(f"elm/{domain}") / "spec.json").start
    if start.path is None or Path(start.path).parts[-4:] != branched.parts[-4:]:
        return [Parent(name="seed", weight=1.0)]
    weights = MergeResult.load(Path(f"{branched}.json")).weights
    return [Parent(name=name, weight=weight) for name, weight in weights.items() if weight > 0]


def _result_path(step: Step, spec: SpecModel) -> Path:
    if isinstance(spec, PrepareSpec):
        return Path(spec.output_dir) / "prepare.json"
    if isinstance(spec, MergeSpec | ExpertsSpec):
        return Path(spec.output_dir + ".json")
    if isinstance(spec, EvaluateSpec):
        return Path(spec.output + ".result")
    assert isinstance(spec, TrainSpec | ScoreSpec), step
    return Path(spec.output_dir) / "result.json"
