"""What a plan is made of: steps with their budget, and what they depend on."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from btm.budget import ModelSize, Updates, divide_updates, sparse_size
from btm.config import Config
from btm.config_launch import GroupSize
from btm.config_model import EngineConfig
from btm.errors import ConfigError

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


def train_step(
    given: PlanInput,
    name: str,
    needs: tuple[str, ...],
    updates: int,
    sequences: int,
    *,
    whole_machine: bool = False,
) -> Step:
    """Training of ``updates`` updates of ``sequences`` sequences, on the whole machine or on the share of one ELM."""
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
    multiple = math.lcm(experts * engine.tensor_parallel, share.num_nodes)
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


def score_step(given: PlanInput, name: str, needs: tuple[str, ...], num_splits: int) -> Step:
    """Scores of one model on dev or test documents of so many domains."""
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


def merge_step(given: PlanInput, name: str, needs: tuple[str, ...]) -> Step:
    """An average of ELMs."""
    return Step(name=name, kind=StepKind.merge, needs=needs, disk_bytes=2 * given.size.num_parameters)


def closing_steps(scores: Sequence[Step]) -> list[Step]:
    """The evaluation of what ``scores`` and the steps between them have scored, and the report."""
    needs = tuple(step.name for step in scores if step.kind is StepKind.score)
    return [
        Step(name="evaluate", kind=StepKind.evaluate, needs=needs),
        Step(name="report", kind=StepKind.report, needs=("evaluate",)),
    ]
