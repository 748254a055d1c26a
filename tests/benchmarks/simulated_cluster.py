"""A cluster in simulated time under the real orchestrator: many ELMs, many groups, failures, and nothing trained.

The orchestrator, its requests, the forest and every file are the real ones. Simulated are the clock and the trainings:
a task takes the time drawn for it, is killed when its group fails, loses what came after its last checkpoint, and
leaves the result that a worker would leave. Seconds that the driver really spends pass on the simulated clock as well.
"""

import heapq
import io
import json
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

import numpy as np
from rich.console import Console
from safetensors.numpy import save_file

from btm import orchestrator
from btm.budget import divide_updates, model_size
from btm.config import Config
from btm.display import RunDisplay
from btm.forest import Forest
from btm.plan import only_available, plan_run
from btm.plan_steps import Machine, PlanInput, Step, StepKind
from btm.records import DomainInfo, Ledger, SplitInfo, TrainResult
from btm.requests import TrainSpec
from btm.step_context import Context
from btm.tracking import make_tracker
from launch.task import State, Status, Task
from launch.task_queue import TaskQueue

LARGEST_SPREAD = 0.3


@dataclass(frozen=True, kw_only=True)
class Trial:
    """What is simulated.

    Attributes:
        num_elms: Trainings.
        num_groups: Groups of processors that run one training each.
        mean_s: Mean length of a training.
        spread: Standard deviation of the lengths over their mean.
        checkpoint_s: Time between two checkpoints.
        start_s: From granting a group to the first update.
        between_failures_s: Mean time between two failures of one group; None for groups that never fail.
        seed: Of all random numbers.
    """

    num_elms: int
    num_groups: int
    mean_s: float = 6 * 3600.0
    spread: float = 0.05
    checkpoint_s: float = 600.0
    start_s: float = 1.0
    between_failures_s: float | None = None
    seed: int = 0

    def lengths(self) -> list[float]:
        """Seconds of each training, normal around the mean."""
        draw = random.Random(self.seed)
        least = self.mean_s * (1 - 3 * LARGEST_SPREAD)
        return [max(least, draw.gauss(self.mean_s, self.spread * self.mean_s)) for _ in range(self.num_elms)]


@dataclass
class Account:
    """What a simulated run did.

    Attributes:
        makespan_s: Simulated seconds until the last ELM had joined.
        ideal_s: The same on groups that never fail, under an orchestrator that costs nothing: a lower bound.
        lost_s: Work after a last checkpoint, done twice.
        failures: Killed trainings.
        driver_s: Real seconds that the driver took.
        joined: ELMs in the forest at the end.
        longest_look_s: Longest time between two looks of the driver at its tasks.
    """

    makespan_s: float = 0.0
    ideal_s: float = 0.0
    lost_s: float = 0.0
    failures: int = 0
    driver_s: float = 0.0
    joined: int = 0
    longest_look_s: float = 0.0

    @property
    def efficiency(self) -> float:
        """Ideal over real time, in [0, 1]."""
        return self.ideal_s / self.makespan_s


@dataclass
class SimulatedCluster:
    """Groups of processors in simulated time; implements :class:`launch.task.Executor`."""

    trial: Trial
    account: Account
    now_s: float = 0.0
    _queue: TaskQueue = field(default_factory=TaskQueue)
    _lengths: dict[str, float] = field(default_factory=dict)
    _done_s: dict[str, float] = field(default_factory=dict)
    _running: dict[str, tuple[Task, float]] = field(default_factory=dict)
    _ends: list[tuple[float, int, str, bool]] = field(default_factory=list)
    _count: int = 0
    _has_news: bool = False

    def __post_init__(self) -> None:
        self._draw = random.Random(self.trial.seed + 1)
        self._drawn = iter(self.trial.lengths())

    def submit(self, task: Task) -> None:
        """Queue ``task``."""
        self._queue.add(task, problem=None)
        self._start_what_fits()

    def poll(self) -> dict[str, Status]:
        """Status of all tasks at the present simulated time."""
        self._has_news = bool(self._ends) and self._ends[0][0] <= self.now_s
        while self._ends and self._ends[0][0] <= self.now_s:
            at_s, _, name, is_failure = heapq.heappop(self._ends)
            task, began_s = self._running.pop(name)
            if is_failure:
                self._fail(name, at_s - began_s)
            else:
                write_result(task)
                self._queue.set(name, State.succeeded)
        self._start_what_fits()
        return dict(self._queue.statuses)

    def cancel(self, name: str, *, grace_s: float = 10.0) -> None:
        """End a task at once."""
        raise NotImplementedError("nothing is cancelled in a simulation")

    def close(self) -> None:
        """Nothing to end."""

    def sleep(self, seconds: float) -> None:
        """Let time pass: to the driver's next look, or where it has nothing to answer to the first after an event."""
        next_s = self._ends[0][0] if self._ends and not self._has_news else self.now_s
        looks = max(1, -int(-(next_s - self.now_s) // seconds))
        self.now_s += looks * seconds

    def _start_what_fits(self) -> None:
        while self._queue.waiting and len(self._running) < self.trial.num_groups:
            task = self._queue.waiting.popleft()
            if task.name not in self._lengths:
                self._lengths[task.name] = next(self._drawn)
            self._queue.set(task.name, State.running)
            self._running[task.name] = (task, self.now_s)
            rest_s = self.trial.start_s + self._lengths[task.name] - self._done_s.get(task.name, 0.0)
            between_s = self.trial.between_failures_s
            failure_s = self._draw.expovariate(1 / between_s) if between_s else rest_s
            self._count += 1
            heapq.heappush(
                self._ends, (self.now_s + min(rest_s, failure_s), self._count, task.name, failure_s < rest_s)
            )

    def _fail(self, name: str, ran_s: float) -> None:
        """Keep the work up to the last checkpoint."""
        worked_s = max(0.0, ran_s - self.trial.start_s)
        kept_s = worked_s // self.trial.checkpoint_s * self.trial.checkpoint_s
        self._done_s[name] = self._done_s.get(name, 0.0) + kept_s
        self.account.lost_s += worked_s - kept_s
        self.account.failures += 1
        self._queue.statuses[name] = Status(name=name, state=State.failed, exit_code=-9)


def simulate(trial: Trial, folder: Path) -> Account:
    """Let the orchestrator train and join the ELMs of ``trial``; the forest is left in ``folder``."""
    account = Account(ideal_s=ideal_s(trial))
    steps, context = prepared(trial, folder)
    cluster = SimulatedCluster(trial, account)
    console = Console(file=io.StringIO(), width=120)
    tracker = make_tracker(context.config.tracking, forest_name="simulated", forest_dir=folder)
    with clock_of(cluster), RunDisplay(console) as display:
        outcome = orchestrator.Orchestrator(steps, context, cluster, display).run(tracker)
    outcome.raise_for_failures()
    account.makespan_s = cluster.now_s
    account.joined = len(Forest.open(folder).domains)
    return account


@contextmanager
def clock_of(cluster: SimulatedCluster) -> Iterator[None]:
    """The orchestrator sleeps in simulated time; what it really takes passes there, too."""
    looked_s = time.perf_counter()

    def sleep(seconds: float) -> None:
        nonlocal looked_s
        took_s = time.perf_counter() - looked_s
        cluster.account.driver_s += took_s
        cluster.account.longest_look_s = max(cluster.account.longest_look_s, took_s)
        cluster.now_s += took_s
        cluster.sleep(seconds)
        looked_s = time.perf_counter()

    with mock.patch.object(orchestrator.time, "sleep", sleep):
        yield


def ideal_s(trial: Trial) -> float:
    """No schedule is shorter than the mean load of the groups, nor than the longest training."""
    lengths = trial.lengths()
    return max(sum(lengths) / min(trial.num_groups, trial.num_elms), max(lengths))


def prepared(trial: Trial, folder: Path) -> tuple[list[Step], Context]:
    """A forest whose texts are prepared and whose seed is trained, on paper, and the steps that are left."""
    domains = [f"domain-{number:04d}" for number in range(trial.num_elms)]
    config = Config.model_validate(
        {
            "forest": str(folder),
            "data": {"domains": {domain: "text.jsonl" for domain in domains}},
            "train": {"tokens": 4 * 256 * trial.num_elms * 256, "batch_tokens": 256 * trial.num_elms},
            "launch": {"max_restarts": 1000, "poll_interval_s": 1.0},
        }
    )
    split = SplitInfo(documents=1, tokens=1, bytes=1)
    for domain in domains:
        info = DomainInfo(
            domain=domain,
            fingerprint=domain,
            tokenizer_sha256="0" * 64,
            sources=[],
            splits={"train": split, "dev": split, "test": split},
        )
        info.save(folder / "corpus" / domain / "corpus.json")
    Forest.create(folder, name="simulated", tokenizer_sha256="0" * 64, vocab_size=1000)
    result_of("seed", "0" * 64, folder / "runs" / "seed").save(folder / "runs" / "seed" / "result.json")
    given = PlanInput(
        config=config,
        machine=Machine(num_cpus=1),
        size=model_size(config.model, config.tokenizer.vocab_size),
        domains=domains,
    )
    kinds = (StepKind.train, StepKind.joining)
    steps = [step for step in plan_run(given) if step.kind in kinds and step.name != "seed"]
    updates = divide_updates(config.train, len(domains))
    context = Context(config=config, forest_dir=folder, updates=updates, domains=domains)
    return only_available(steps, ["seed"]), context


def result_of(name: str, spec_sha256: str, folder: Path) -> TrainResult:
    """What a worker says at its end."""
    return TrainResult(
        name=name,
        spec_sha256=spec_sha256,
        model_dir=str(folder / "model"),
        ledger=Ledger(),
        updates=1,
        skipped_updates=0,
        final_loss=1.0,
        num_parameters=1,
    )


def write_result(task: Task) -> None:
    """Leave a model and a result, as the worker of a training does."""
    spec = TrainSpec.load(Path(task.arguments[0]))
    folder = Path(spec.output_dir)
    (folder / "model").mkdir(parents=True)
    (folder / "model" / "config.json").write_text(json.dumps({"model_type": "none"}), encoding="utf-8")
    save_file({"weight": np.zeros(1, dtype=np.float32)}, folder / "model" / "model.safetensors")
    result_of(spec.name, spec.sha256, folder).save(folder / "result.json")
