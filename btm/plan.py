"""From a configuration to the steps of a run: a pure function, so that ``dry_run=true`` shows exactly what will happen.

    prepare -> seed -> elm/<domain> x N -> (join) -> score/... -> average/... -> evaluate -> report
                    -> dense, random/<i>                       /

With expert layers (``ffn=demix`` and others) one sparse model takes the place of the forest:

    prepare -> sparse (-> routers), dense -> score/... -> evaluate -> report

and a domain that joins a DEMix model takes the steps ``prepare -> branch -> expert -> grow -> (join)``.

Steps name what they need; the orchestrator starts whatever is ready. A step's name is also its directory under
``runs/``. What a step does is written by ``btm/steps.py`` when it starts, because some of it (checksums, branch
weights) is known only then.
"""

from collections.abc import Sequence
from dataclasses import replace

from btm.budget import divide_updates
from btm.config_merge import MergeMethodName
from btm.config_train import BranchSource
from btm.plan_sparse import sparse_addition, sparse_evaluation, sparse_training
from btm.plan_steps import PlanInput, Step, StepKind, closing_steps, merge_step, score_step, train_step


def plan_run(given: PlanInput) -> list[Step]:
    """Steps of ``btm run``: the whole forest, or one sparse model, its baselines and their evaluation."""
    if given.config.ffn.is_sparse:
        return [*sparse_training(given), *plan_evaluation(given)]
    updates = given.updates
    steps = [
        Step(name="prepare", kind=StepKind.prepare, num_cpus=given.machine.cpus_per_node),
        train_step(given, "seed", ("prepare",), updates.seed, updates.batch_sequences, whole_machine=True),
    ]
    for domain in given.domains:
        steps += _elm_steps(given, domain)
    if given.config.baselines.dense:
        steps.append(train_step(given, "dense", ("seed",), updates.elm, updates.batch_sequences, whole_machine=True))
    if given.config.baselines.random_split:
        steps += [
            train_step(given, name, ("seed",), updates.elm, updates.elm_batch_sequences)
            for name in random_split_names(given.domains)
        ]
    return [*steps, *plan_evaluation(given)]


def plan_add(given: PlanInput, domain: str, *, num_original_domains: int) -> list[Step]:
    """Steps of ``btm add``: branch, train and join one ELM with the same share of tokens as the first ones.

    Of a DEMix model these are the experts of one domain. ``given.domains`` are those already there.
    """
    if given.config.ffn.is_sparse:
        return sparse_addition(given, domain, divide_updates(given.config.train, num_original_domains))
    source = given.config.branch.source
    steps = [Step(name=f"prepare/{domain}", kind=StepKind.prepare, num_cpus=given.machine.cpus_per_node)]
    needs: tuple[str, ...] = (steps[0].name,)
    if source in (BranchSource.nearest, BranchSource.posterior):
        steps += [score_step(given, f"branch/{domain}/{elm}", needs, 1) for elm in given.domains]
        needs = tuple(step.name for step in steps)
    if source is not BranchSource.seed:
        steps.append(merge_step(given, f"branch/{domain}", needs))
        needs = (steps[-1].name,)
    updates = divide_updates(given.config.train, num_original_domains)
    name = f"elm/{domain}"
    steps.append(train_step(given, name, needs, updates.elm, updates.elm_batch_sequences))
    steps.append(Step(name=f"join/{domain}", kind=StepKind.joining, needs=(name,)))
    return steps


def plan_evaluation(given: PlanInput) -> list[Step]:
    """Steps of ``btm evaluate``: score every model on every domain, average, mix, report."""
    if given.config.ffn.is_sparse:
        return sparse_evaluation(given)
    config, count = given.config, len(given.evaluated)
    joined = tuple(f"join/{domain}" for domain in given.domains)
    steps = [score_step(given, "score/seed", ("seed",), count)]
    steps += [score_step(given, f"score/elm/{d}", (f"join/{d}",), 2 * count) for d in given.domains]
    if config.baselines.dense:
        steps.append(score_step(given, "score/dense", ("dense",), count))
    if config.baselines.random_split:
        steps += [score_step(given, f"score/{n}", (n,), count) for n in random_split_names(given.domains)]
    steps.append(merge_step(given, f"average/{MergeMethodName.uniform}", joined))
    steps.append(score_step(given, f"score/{steps[-1].name}", (steps[-1].name,), count))
    elm_scores = tuple(f"score/elm/{domain}" for domain in given.domains)
    for domain in given.evaluated:
        steps.append(merge_step(given, f"average/{MergeMethodName.posterior}/{domain}", elm_scores))
        steps.append(score_step(given, f"score/{steps[-1].name}", (steps[-1].name,), 1))
    return [*steps, *closing_steps(steps)]


def random_split_names(domains: Sequence[str]) -> list[str]:
    """Names of the random-split forest's ELMs: as many as there are domains."""
    return [f"random/{index}" for index in range(len(domains))]


def only_available(steps: Sequence[Step], finished: Sequence[str]) -> list[Step]:
    """Drop needs that are finished already (``finished``), for plans that begin in the middle."""
    names = {step.name for step in steps}
    done = set(finished)
    return [replace(step, needs=tuple(n for n in step.needs if n in names and n not in done)) for step in steps]


def _elm_steps(given: PlanInput, domain: str) -> list[Step]:
    updates, name = given.updates, f"elm/{domain}"
    return [
        train_step(given, name, ("seed",), updates.elm, updates.elm_batch_sequences),
        Step(name=f"join/{domain}", kind=StepKind.joining, needs=(name,)),
    ]
