"""Drive a plan to its end: start what is ready, restart what died, let results change the forest, show progress.

The forest directory is the state. A driver that is killed is started again with the same command and finds the
finished steps by their results; workers resume from their own checkpoints. A step that fails for good takes its
dependants with it and nobody else.
"""

import contextlib
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from btm.display import RunDisplay, TaskView
from btm.errors import BtmError, ForestError, RunError
from btm.files import identity_of
from btm.plan_steps import Step, StepKind
from btm.requests import SpecModel
from btm.step_context import Context
from btm.step_specs import build_spec
from btm.steps import EXIT_PREEMPTED, MODULES, is_finished, register
from btm.tracking import Tracker
from launch.logs import end_of_log
from launch.task import Executor, State, Status, Task

_LOG_LINES = 15
_REASON_CHARACTERS = 300
_SUBMITTED = ("queued", "running")


class StoppedError(BtmError):
    """The user or the scheduler asked to stop; everything can be resumed."""

    exit_code = 130

    def __init__(self) -> None:
        super().__init__("stopped on request; the same command goes on from the last checkpoints")


@dataclass(slots=True)
class StepState:
    """Where one step of a run stands."""

    step: Step
    state: str = "waiting"
    """waiting, queued, running, restarting, done, failed or skipped."""
    spec: SpecModel | None = None
    restarts: int = 0
    log_start: int = 0
    """Bytes of the log before the present attempt."""
    checkpoints: frozenset[str] = frozenset()
    """Checkpoints before the present attempt."""
    reason: str = ""
    was_there: bool = False
    """Finished by an earlier run."""


@dataclass(slots=True)
class Outcome:
    """What a run did."""

    done: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    """Step -> reason with the end of its log."""
    skipped: list[str] = field(default_factory=list)
    restarts: dict[str, int] = field(default_factory=dict)
    reused: list[str] = field(default_factory=list)

    def raise_for_failures(self) -> None:
        """Raise when a step failed.

        Raises:
            RunError: Naming each failed step with the end of its log.
        """
        if self.failed:
            parts = [f"{name} failed: {reason}" for name, reason in self.failed.items()]
            parts.append(f"not run because of it: {', '.join(self.skipped) or 'nothing'}")
            parts.append("the forest is valid without them; the same command tries again from the last checkpoints")
            raise RunError("\n".join(parts))


class Orchestrator:
    """Runs the steps of one plan on one executor."""

    def __init__(self, steps: Sequence[Step], context: Context, executor: Executor, display: RunDisplay) -> None:
        self._states = {step.name: StepState(step) for step in steps}
        self._context = context
        self._executor = executor
        self._display = display
        self._home = identity_of(context.forest_dir)
        self._stopping = False

    def run(self, tracker: Tracker, *, after_step: Callable[[Step], None] | None = None) -> Outcome:
        """Run until nothing more can be done.

        Args:
            tracker: Mirror of the training metrics.
            after_step: Called when a step has just finished (tests use it to interfere).

        Raises:
            StoppedError: On Ctrl-C or TERM, after the workers have written their checkpoints.
            ForestError: If somebody deletes the forest's directory; the workers have been ended then.
        """
        with self._signals():
            try:
                while self._advance(tracker, after_step):
                    self._show(tracker)
                    time.sleep(self._context.config.launch.poll_interval_s)
            except StoppedError:
                self._stop(grace_s=30.0)
                raise
            finally:
                self._show(tracker)
        return self._outcome()

    def _advance(self, tracker: Tracker, after_step: Callable[[Step], None] | None) -> bool:
        """Start, collect and restart; False when every step is done, failed or skipped."""
        if self._home and identity_of(self._context.forest_dir) != self._home:
            # A worker that writes a checkpoint makes the directory again, with nothing else in it.
            self._stop(grace_s=0.0)
            raise ForestError(f"{self._context.forest_dir} was deleted or moved while its run went on; run it again")
        if self._stopping:
            raise StoppedError
        started = True
        while started:
            started = any([self._start(state, tracker) for state in self._states.values() if self._is_ready(state)])
        for name, status in self._executor.poll().items():
            state = self._states.get(name)
            if not state or state.state not in _SUBMITTED:
                continue
            state.state = "queued" if status.state is State.queued else "running"
            if status.is_final:
                self._collect(state, status, tracker)
                if after_step and state.state == "done":
                    after_step(state.step)
        return any(state.state in ("waiting", "restarting", *_SUBMITTED) for state in self._states.values())

    def _is_ready(self, state: StepState) -> bool:
        if state.state == "restarting":
            return True
        if state.state != "waiting":
            return False
        needed = [self._states[name].state for name in state.step.needs if name in self._states]
        if any(other in ("failed", "skipped") for other in needed):
            state.state = "skipped"
            return False
        return all(other == "done" for other in needed)

    def _start(self, state: StepState, tracker: Tracker) -> bool:
        """Start one step; True when it was finished at once, so that others may have become ready."""
        step = state.step
        if step.kind is StepKind.joining:
            if not is_finished(step, None, self._context):
                register(step, self._context)
            state.state = "done"
            return True
        state.spec = build_spec(step, self._context)
        # Only the worker of a preparation sees whether the text has changed; it re-uses what fits, quickly.
        if step.kind is not StepKind.prepare and is_finished(step, state.spec, self._context):
            state.was_there = state.state == "waiting"
            state.state = "done"
            register(step, self._context)
            return True
        task = make_task(step, state.spec, self._context)
        state.log_start = task.log_path.stat().st_size if task.log_path.is_file() else 0
        state.checkpoints = self._context.checkpoints(step.name)
        self._executor.submit(task)
        if step.kind is StepKind.train:
            tracker.follow(step.name, self._metrics_path(step), config=_tracked_config(state.spec))
        state.state = "queued"
        return False

    def _collect(self, state: StepState, status: Status, tracker: Tracker) -> None:
        if status.state is State.succeeded:
            if state.spec is not None and not is_finished(state.step, state.spec, self._context):
                status = Status(name=status.name, state=State.failed, reason="it ended well but left no result")
            else:
                register(state.step, self._context)
                state.state = "done"
                return
        log = self._context.log(state.step.name)
        state.reason = f"{_reason(status)}\n{end_of_log(log, _LOG_LINES, start=state.log_start)}"
        if status.exit_code == EXIT_PREEMPTED and self._context.checkpoints(state.step.name) != state.checkpoints:
            # It was asked to make room and has got on meanwhile, which no limit of failures should count.
            state.state = "restarting"
            self._display.log(f"{state.step.name}: stopped on request; goes on from its checkpoint")
        elif state.restarts < self._context.config.launch.max_restarts and not _is_final_failure(status):
            state.restarts += 1
            state.state = "restarting"
            self._display.log(f"{state.step.name}: {_reason(status)}; restart {state.restarts} from its checkpoint")
        else:
            state.state = "failed"
            self._display.log(f"{state.step.name} failed: {_reason(status)}")

    def _stop(self, *, grace_s: float) -> None:
        """Let the workers write their checkpoints, then wait for their end."""
        running = [name for name, state in self._states.items() if state.state in _SUBMITTED]
        for name in running:
            self._executor.cancel(name, grace_s=grace_s)
        deadline = time.monotonic() + grace_s + 5.0
        while time.monotonic() < deadline:
            statuses = self._executor.poll()
            if all(statuses[name].is_final for name in running if name in statuses):
                break
            time.sleep(0.05)

    def _show(self, tracker: Tracker) -> None:
        tracker.poll()
        self._display.update([self._view(state) for state in self._states.values()])

    def _view(self, state: StepState) -> TaskView:
        step = state.step
        training = step.kind is StepKind.train
        return TaskView(
            name=step.name,
            state=state.state,
            metrics_path=self._metrics_path(step) if training else None,
            total_updates=step.updates if training else None,
            total_tokens=step.tokens if training else None,
            note="finished earlier" if state.was_there else "",
            first_update=getattr(state.spec, "first_update", 0),
        )

    def _metrics_path(self, step: Step) -> Path:
        return self._context.run_dir(step.name) / "metrics.jsonl"

    def _outcome(self) -> Outcome:
        outcome = Outcome()
        for name, state in self._states.items():
            if state.state == "done":
                outcome.done.append(name)
            elif state.state == "failed":
                outcome.failed[name] = state.reason
            else:
                outcome.skipped.append(name)
            if state.restarts:
                outcome.restarts[name] = state.restarts
            if state.was_there:
                outcome.reused.append(name)
        return outcome

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """Turn INT and TERM into an orderly stop at the next look."""

        def stop(_number: int, _frame: FrameType | None) -> None:
            if self._stopping:
                raise KeyboardInterrupt
            self._stopping = True

        before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def make_task(step: Step, spec: SpecModel | None, context: Context) -> Task:
    """Write the request of ``step`` and describe its processes."""
    directory = context.run_dir(step.name)
    directory.mkdir(parents=True, exist_ok=True)
    arguments = [str(context.forest_dir)]
    if spec is not None:
        spec.save(directory / "spec.json")
        arguments = [str(directory / "spec.json")]
    return Task(
        name=step.name,
        module=MODULES[step.kind],
        arguments=arguments,
        log_path=context.log(step.name),
        num_processes=step.num_processes,
        num_cpus=step.num_cpus,
        num_gpus=step.num_gpus,
        num_nodes=step.num_nodes,
    )


def _reason(status: Status) -> str:
    if status.reason:
        return status.reason.splitlines()[0][:_REASON_CHARACTERS]
    if status.exit_code is not None and status.exit_code < 0:
        return f"killed by signal {-status.exit_code}"
    return f"exit code {status.exit_code}"


def _is_final_failure(status: Status) -> bool:
    """An error that the user has to repair (exit code 1 or 2) comes again on every restart."""
    return status.exit_code in (1, 2)


def _tracked_config(spec: SpecModel | None) -> dict[str, object]:
    if spec is None:
        return {}
    return spec.model_dump(
        mode="json", include={"name", "batch_sequences", "total_updates", "train", "model", "engine"}
    )
