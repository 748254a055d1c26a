"""``btm merge``: average the ELMs of a forest into one Hugging Face model."""

import time
from pathlib import Path

from btm.config import Config
from btm.config_merge import MergeMethodName
from btm.errors import ConfigError
from btm.forest import Forest
from btm.plan import only_available, plan_evaluation
from btm.records import MergeResult
from btm.requests import MergeInput, MergeSpec
from btm.session import console_for, execute, existing_forest, make_context, plan_input
from btm.step_specs_evaluation import dev_source


def main(config: Config) -> None:
    """Merge as ``config.merge`` says, and print the weights.

    Raises:
        ConfigError: If ``merge.elms``, ``merge.weights`` or ``merge.domain`` name something that is not there.
    """
    from btm.merge.worker import run_spec

    began, console, forest = time.monotonic(), console_for(config), existing_forest(config)
    check_names(config, forest)
    needs_scores = config.merge.method in (MergeMethodName.posterior, MergeMethodName.nearest)
    if needs_scores:
        with Forest.lock(config.forest):
            score_on_dev(config, forest)
    spec = merge_spec(config, forest)
    result = run_spec(spec) or MergeResult.load(Path(spec.output_dir + ".json"))
    weights = ", ".join(f"{name} {weight:.3f}" for name, weight in result.weights.items() if weight)
    console.print(f"{spec.method}: {weights}", markup=False)
    console.print(f"{spec.output_dir} in {time.monotonic() - began:.1f} s", markup=False, soft_wrap=True)


def check_names(config: Config, forest: Forest) -> None:
    """Compare the names in ``config.merge`` with the forest.

    Raises:
        ConfigError: Listing every unknown name.
    """
    merge, known = config.merge, forest.domains
    problems = [f"merge.elms: no ELM {name!r}; the forest has {known}" for name in merge.elms if name not in known]
    problems += [
        f"merge.weights: no ELM {name!r}; the forest has {known}" for name in merge.weights if name not in known
    ]
    if not known:
        problems.append(f"the forest {config.forest} has no ELM to merge")
    if merge.method not in (MergeMethodName.uniform, MergeMethodName.weighted):
        prepared = sorted(path.parent.name for path in forest.path.glob("corpus/*/corpus.json"))
        if merge.domain not in prepared:
            problems.append(f"merge.method={merge.method} needs merge.domain, one of {prepared}, got {merge.domain!r}")
    if problems:
        raise ConfigError(problems)


def merge_spec(config: Config, forest: Forest) -> MergeSpec:
    """The request for the merge stage, in manifest order whatever order the user named the ELMs in."""
    merge = config.merge
    chosen = [record for record in forest.manifest.elms if not merge.elms or record.domain in merge.elms]
    name = str(merge.method) + (f"-{merge.domain}" if merge.domain else "")
    scores = forest.path / "scores" / "elm"
    context = make_context(config, [], [])
    return MergeSpec(
        root=str(forest.path),
        name=f"merged/{name}",
        method=merge.method,
        models=[
            MergeInput(
                name=record.domain,
                directory=str(forest.path / record.directory),
                files=record.files,
                checksums=record.checksums,
                score_dir=str(scores / record.domain) if merge.domain else None,
            )
            for record in chosen
        ],
        weights=merge.weights,
        domain=merge.domain,
        dev=dev_source(merge.domain, context) if merge.domain else None,
        sequence_length=config.evaluate.sequence_length or config.train.sequence_length,
        batch_sequences=config.evaluate.batch_sequences,
        tokenizer_dir=str(forest.tokenizer_dir),
        output_dir=merge.output or str(forest.path / "merged" / name),
        memory_bytes=merge.memory_bytes,
    )


def score_on_dev(config: Config, forest: Forest) -> None:
    """Score every ELM on the dev documents of every prepared domain, where that has not been done."""
    prepared = [path.parent.name for path in sorted(forest.path.glob("corpus/*/corpus.json"))]
    trained = [name for name in prepared if name in forest.domains]
    others = [name for name in prepared if name not in trained]
    steps = [s for s in plan_evaluation(plan_input(config, forest.domains, others)) if s.name.startswith("score/elm/")]
    finished = [f"join/{name}" for name in forest.domains]
    execute(only_available(steps, finished), make_context(config, trained, others), console_for(config))
