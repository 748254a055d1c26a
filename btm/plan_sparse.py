"""Steps of a run that trains one sparse model instead of a forest, and of domains that join it.

Called by :mod:`btm.plan`.
"""

from collections.abc import Sequence
from dataclasses import replace

from btm.budget import Updates
from btm.config import Config
from btm.config_ffn import FfnLayer
from btm.plan_steps import ROUTERS, PlanInput, Step, StepKind, closing_steps, score_step, train_step
from btm.records import TRAINING_ROUTING


def sparse_score_names(config: Config, domains: Sequence[str]) -> list[str]:
    """What of a sparse model is scored.

    The model with each of its routings, or the models of the domains where each has its own experts.
    """
    if config.ffn.layer is FfnLayer.demix:
        return [f"sparse/{domain}" for domain in domains]
    return ["sparse", TRAINING_ROUTING] if config.ffn.has_two_routings else ["sparse"]


def router_updates(config: Config, updates: Updates) -> int:
    """Updates of the auxiliary routers after their model; 0 where they learn beside it."""
    tokens = config.ffn.auxiliary_tokens
    return max(1, tokens // (updates.batch_sequences * config.train.sequence_length)) if tokens else 0


def sparse_training(given: PlanInput) -> list[Step]:
    """One model takes the whole budget; the dense one beside it starts from scratch, too."""
    updates = given.updates
    names = ["sparse", *(["dense"] if given.config.baselines.dense else [])]
    steps = [
        Step(name="prepare", kind=StepKind.prepare, num_cpus=given.machine.cpus_per_node),
        *(
            train_step(given, name, ("prepare",), updates.total, updates.batch_sequences, whole_machine=True)
            for name in names
        ),
    ]
    if count := router_updates(given.config, updates):
        routers = train_step(given, ROUTERS, ("sparse",), count, updates.batch_sequences, whole_machine=True)
        # The frozen model runs forward only.
        steps.append(replace(routers, flops=routers.flops / 3))
    return steps


def sparse_addition(given: PlanInput, domain: str, updates: Updates) -> list[Step]:
    """The new experts see as many tokens as each of the first ones did, beside weights that stay as they are."""
    prepare = Step(name=f"prepare/{domain}", kind=StepKind.prepare, num_cpus=given.machine.cpus_per_node)
    tokens = given.config.evaluate.max_tokens * len(given.domains)
    branch = Step(
        name=f"branch/{domain}",
        kind=StepKind.experts,
        needs=(prepare.name,),
        num_cpus=given.config.launch.cpus_on_one_node,
        num_gpus=min(1, given.config.launch.gpus_per_elm),
        tokens=tokens,
        flops=tokens * given.size.flops_per_token(given.config.train.sequence_length) / 3,
        disk_bytes=2 * given.size.num_parameters,
    )
    name = f"expert/{domain}"
    train = train_step(given, name, (branch.name,), updates.total, updates.elm_batch_sequences)
    size = 2 * given.size_of("sparse", more_domains=1).num_parameters
    grow = Step(name=f"grow/{domain}", kind=StepKind.experts, needs=(name,), disk_bytes=size)
    return [prepare, branch, train, grow, Step(name=f"join/{domain}", kind=StepKind.joining, needs=(grow.name,))]


def sparse_evaluation(given: PlanInput) -> list[Step]:
    """Score every model that the run has made, mix those of domains with experts of their own, report."""
    config, count = given.config, len(given.evaluated)
    names = sparse_score_names(config, given.domains)
    # Where domains have experts of their own, dev documents give the prior over them.
    splits = 2 * count if config.ffn.layer is FfnLayer.demix else count
    learned = {"sparse": ROUTERS} if config.ffn.auxiliary_tokens else {}
    steps = [score_step(given, f"score/{name}", (learned.get(name, "sparse"),), splits) for name in names]
    if config.baselines.dense:
        steps.append(score_step(given, "score/dense", ("dense",), count))
    return [*steps, *closing_steps(steps)]
