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

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

from btm.budget import ModelSize, Updates, divide_updates, sparse_size
from btm.config import Config
from btm.config_ffn import FfnLayer
from btm.config_launch import GroupSize
from btm.config_merge import MergeMethodName
from btm.config_model import EngineConfig
from btm.config_train import BranchSource
from btm.errors import ConfigError
from btm.records import TRAINING_ROUTING

ROUTERS = "routers"
"""The training of auxiliary routers after their model."""


class StepKind(StrEnum):
    """What a step does; decides the module that runs it."""

    prepare = "prepare"
    train = "train"
    joining = "join"
    score = "score"
    merge = "merge"
    experts = "experts"
    evaluate = "evaluate"
    report = "report"


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """One unit of work with its budget."""

    name: str
    kind: StepKind
    needs: tuple[str, ...] = ()
    num_processes: int = 1
    num_cpus: int = 1
    num_gpus: int = 0
    num_nodes: int = 1
    """Nodes that share out processes, cores and GPUs equally."""
    tokens: int = 0
    """Tokens trained on or scored."""
    updates: int = 0
    flops: float = 0.0
    disk_bytes: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """What the executor can give out to one step."""

    num_cpus: int
    num_gpus: int = 0
    num_nodes: int = 1
    """Nodes that these are on, equally many on each."""

    @property
    def cpus_per_node(self) -> int:
        """Cores that a step on one node can have."""
        return self.num_cpus // self.num_nodes


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanInput:
    """Everything that a plan depends on."""

    config: Config
    machine: Machine
    size: ModelSize
    domains: Sequence[str]
    """Domains with an ELM, in order."""
    novel: Sequence[str] = ()
    """Domains that are only evaluated."""

    @property
    def updates(self) -> Updates:
        """Division of the token budget."""
        return divide_updates(self.config.train, len(self.domains))

    @property
    def evaluated(self) -> list[str]:
        """Domains with and without an ELM."""
        return [*self.domains, *self.novel]

    def size_of(self, name: str, *, more_domains: int = 0) -> ModelSize:
        """Size of the model that the training ``name`` makes, with the experts of ``more_domains`` that joined it."""
        if name not in ("sparse", ROUTERS):
            return self.size
        num_domains = len(self.domains) + more_domains
        return sparse_size(self.size, self.config.ffn, num_domains, is_pretrained=bool(self.config.model.path))


def plan_run(given: PlanInput) -> list[Step]:
    """Steps of ``btm run``: the whole forest, or one sparse model, its baselines and their evaluation."""
    if given.config.ffn.is_sparse:
        return [*_sparse_training(given), *plan_evaluation(given)]
    updates = given.updates
    steps = [
        Step(name="prepare", kind=StepKind.prepare, num_cpus=given.machine.cpus_per_node),
        _train_step(given, "seed", ("prepare",), updates.seed, updates.batch_sequences, whole_machine=True),
    ]
    for domain in given.domains:
        steps += _elm_steps(given, domain)
    if given.config.baselines.dense:
        steps.append(_train_step(given, "dense", ("seed",), updates.elm, updates.batch_sequences, whole_machine=True))
    if given.config.baselines.random_split:
        steps += [
            _train_step(given, name, ("seed",), updates.elm, updates.elm_batch_sequences)
            for name in random_split_names(given.domains)
        ]
    return [*steps, *plan_evaluation(given)]


def plan_add(given: PlanInput, domain: str, *, num_original_domains: int) -> list[Step]:
    """Steps of ``btm add``: branch, train and join one ELM with the same share of tokens as the first ones.

    Of a DEMix model these are the experts of one domain. ``given.domains`` are those already there.
    """
    if given.config.ffn.is_sparse:
        return _sparse_addition(given, domain, divide_updates(given.config.train, num_original_domains))
    source = given.config.branch.source
    steps = [Step(name=f"prepare/{domain}", kind=StepKind.prepare, num_cpus=given.machine.cpus_per_node)]
    needs: tuple[str, ...] = (steps[0].name,)
    if source in (BranchSource.nearest, BranchSource.posterior):
        steps += [_score_step(given, f"branch/{domain}/{elm}", needs, 1) for elm in given.domains]
        needs = tuple(step.name for step in steps)
    if source is not BranchSource.seed:
        steps.append(_merge_step(given, f"branch/{domain}", needs))
        needs = (steps[-1].name,)
    updates = divide_updates(given.config.train, num_original_domains)
    name = f"elm/{domain}"
    steps.append(_train_step(given, name, needs, updates.elm, updates.elm_batch_sequences))
    steps.append(Step(name=f"join/{domain}", kind=StepKind.joining, needs=(name,)))
    return steps


def plan_evaluation(given: PlanInput) -> list[Step]:
    """Steps of ``btm evaluate``: score every model on every domain, average, mix, report."""
    if given.config.ffn.is_sparse:
        return _sparse_evaluation(given)
    config, count = given.config, len(given.evaluated)
    joined = tuple(f"join/{domain}" for domain in given.domains)
    steps = [_score_step(given, "score/seed", ("seed",), count)]
    steps += [_score_step(given, f"score/elm/{d}", (f"join/{d}",), 2 * count) for d in given.domains]
    if config.baselines.dense:
        steps.append(_score_step(given, "score/dense", ("dense",), count))
    if config.baselines.random_split:
        steps += [_score_step(given, f"score/{n}", (n,), count) for n in random_split_names(given.domains)]
    steps.append(_merge_step(given, f"average/{MergeMethodName.uniform}", joined))
    steps.append(_score_step(given, f"score/{steps[-1].name}", (steps[-1].name,), count))
    elm_scores = tuple(f"score/elm/{domain}" for domain in given.domains)
    for domain in given.evaluated:
        steps.append(_merge_step(given, f"average/{MergeMethodName.posterior}/{domain}", elm_scores))
        steps.append(_score_step(given, f"score/{steps[-1].name}", (steps[-1].name,), 1))
    scores = tuple(step.name for step in steps if step.kind is StepKind.score)
    steps.append(Step(name="evaluate", kind=StepKind.evaluate, needs=scores))
    steps.append(Step(name="report", kind=StepKind.report, needs=("evaluate",)))
    return steps


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


def random_split_names(domains: Sequence[str]) -> list[str]:
    """Names of the random-split forest's ELMs: as many as there are domains."""
    return [f"random/{index}" for index in range(len(domains))]


def only_available(steps: Sequence[Step], finished: Sequence[str]) -> list[Step]:
    """Drop needs that are finished already (``finished``), for plans that begin in the middle."""
    names = {step.name for step in steps}
    done = set(finished)
    return [replace(step, needs=tuple(n for n in step.needs if n in names and n not in done)) for step in steps]


def _sparse_training(given: PlanInput) -> list[Step]:
    """One model takes the whole budget; the dense one beside it starts from scratch, too."""
    updates = given.updates
    names = ["sparse", *(["dense"] if given.config.baselines.dense else [])]
    steps = [
        Step(name="prepare", kind=StepKind.prepare, num_cpus=given.machine.cpus_per_node),
        *(
            _train_step(given, name, ("prepare",), updates.total, updates.batch_sequences, whole_machine=True)
            for name in names
        ),
    ]
    if count := router_updates(given.config, updates):
        routers = _train_step(given, ROUTERS, ("sparse",), count, updates.batch_sequences, whole_machine=True)
        # The frozen model runs forward only.
        steps.append(replace(routers, flops=routers.flops / 3))
    return steps


def _sparse_addition(given: PlanInput, domain: str, updates: Updates) -> list[Step]:
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
    train = _train_step(given, name, (branch.name,), updates.total, updates.elm_batch_sequences)
    size = 2 * given.size_of("sparse", more_domains=1).num_parameters
    grow = Step(name=f"grow/{domain}", kind=StepKind.experts, needs=(name,), disk_bytes=size)
    return [prepare, branch, train, grow, Step(name=f"join/{domain}", kind=StepKind.joining, needs=(grow.name,))]


def _sparse_evaluation(given: PlanInput) -> list[Step]:
    config, count = given.config, len(given.evaluated)
    names = sparse_score_names(config, given.domains)
    # Where domains have experts of their own, dev documents give the prior over them.
    splits = 2 * count if config.ffn.layer is FfnLayer.demix else count
    learned = {"sparse": ROUTERS} if config.ffn.auxiliary_tokens else {}
    steps = [_score_step(given, f"score/{name}", (learned.get(name, "sparse"),), splits) for name in names]
    if config.baselines.dense:
        steps.append(_score_step(given, "score/dense", ("dense",), count))
    scores = tuple(step.name for step in steps)
    steps.append(Step(name="evaluate", kind=StepKind.evaluate, needs=scores))
    steps.append(Step(name="report", kind=StepKind.report, needs=("evaluate",)))
    return steps


def _elm_steps(given: PlanInput, domain: str) -> list[Step]:
    updates, name = given.updates, f"elm/{domain}"
    return [
        _train_step(given, name, ("seed",), updates.elm, updates.elm_batch_sequences),
        Step(name=f"join/{domain}", kind=StepKind.joining, needs=(name,)),
    ]


def _train_step(
    given: PlanInput,
    name: str,
    needs: tuple[str, ...],
    updates: int,
    sequences: int,
    *,
    whole_machine: bool = False,
) -> Step:
    config, length = given.config, given.config.train.sequence_length
    tokens = updates * sequences * length
    share = _whole_machine(given) if whole_machine else _share_of(given, name)
    processes = _num_processes(share, sequences, config.engine, has_experts=name == "sparse")
    size = given.size_of(name)
    return Step(
        name=name,
        kind=StepKind.train,
        needs=needs,
        num_processes=processes,
        num_cpus=max(processes, share.num_cpus),
        num_gpus=min(share.num_gpus, processes),
        num_nodes=share.num_nodes,
        tokens=tokens,
        updates=updates,
        flops=tokens * size.flops_per_token(length),
        disk_bytes=config.train.keep_checkpoints * size.checkpoint_bytes + size.model_bytes(config.engine.dtype),
    )


def _num_processes(share: GroupSize, sequences: int, engine: EngineConfig, *, has_experts: bool) -> int:
    """The largest number of processes that shares out the sequences of an update, layers, experts and nodes equally.

    Processes that share out a layer see the same sequences, those that share out experts different ones.

    Raises:
        ConfigError: If there is none.
    """
    experts = engine.expert_parallel if has_experts else 1
    multiple = math.lcm(experts, engine.tensor_parallel, share.num_nodes)
    counts = range(multiple, share.num_processes + 1, multiple)
    fitting = [count for count in counts if sequences % (count // engine.tensor_parallel) == 0]
    if fitting:
        return fitting[-1]
    keys = {
        "engine.expert_parallel": experts,
        "engine.tensor_parallel": engine.tensor_parallel,
        "launch.nodes_per_elm": share.num_nodes,
    }
    asked = ", ".join(f"{key}={value}" for key, value in keys.items() if value > 1)
    raise ConfigError(
        [
            f"{asked} needs updates whose sequences ({sequences}) and up to {share.num_processes} processes it "
            f"divides; make train.batch_tokens a multiple of {multiple} * train.sequence_length, and give a model at "
            f"least {multiple} processes (engine.num_processes, launch.gpus_per_elm)"
        ]
    )


def _share_of(given: PlanInput, name: str) -> GroupSize:
    """What one ELM (``elm/<domain>``), the experts of one domain or a model of the random split trains on."""
    kind, _, domain = name.partition("/")
    elm = domain if kind in ("elm", "expert") else ""
    return given.config.launch.size_of(elm, num_processes=given.config.engine.num_processes)


def _whole_machine(given: PlanInput) -> GroupSize:
    config = given.config
    gpus = given.machine.num_gpus if config.launch.gpus_per_elm else 0
    processes = max(gpus, config.engine.num_processes)
    machine = given.machine
    return GroupSize(num_cpus=machine.num_cpus, num_gpus=gpus, num_processes=processes, num_nodes=machine.num_nodes)


def _score_step(given: PlanInput, name: str, needs: tuple[str, ...], num_splits: int) -> Step:
    tokens = num_splits * given.config.evaluate.max_tokens
    length = given.config.evaluate.sequence_length or given.config.train.sequence_length
    return Step(
        name=name,
        kind=StepKind.score,
        needs=needs,
        num_cpus=given.config.launch.cpus_on_one_node,
        num_gpus=min(1, given.config.launch.gpus_per_elm),
        tokens=tokens,
        flops=tokens * given.size.flops_per_token(length) / 3,
        disk_bytes=4 * tokens,
    )


def _merge_step(given: PlanInput, name: str, needs: tuple[str, ...]) -> Step:
    return Step(name=name, kind=StepKind.merge, needs=needs, disk_bytes=2 * given.size.num_parameters)
