"""Attempts at one step: real workers on the local executor, ended from outside while they train."""

import os
import shutil
import signal
from collections.abc import Mapping
from pathlib import Path

import pytest
from rich.console import Console

from btm.config_parse import parse_config
from btm.display import RunDisplay
from btm.errors import ForestError
from btm.files import read_json
from btm.forest import Forest
from btm.orchestrator import Orchestrator, Outcome
from btm.plan import plan_add
from btm.records import TrainResult
from btm.session import make_context, plan_input
from btm.steps import EXIT_PREEMPTED
from launch.local import LocalExecutor
from launch.task import State
from tests.conftest import run_btm

STEP = "elm/mail"
MODULES = ("torch", "transformers", "btm.train.worker")


class Interference:
    """A tracker that signals the worker of ``elm/mail`` once its attempt has written a checkpoint."""

    def __init__(self, forest: Path, executor: LocalExecutor, number: signal.Signals, times: int) -> None:
        self.run, self.executor, self.number, self.times = forest / "runs" / STEP, executor, number, times
        self.attempt: object = None
        self.seen: set[str] = set()
        self.is_told = False

    def follow(self, task_name: str, metrics_path: Path, config: Mapping[str, object]) -> None:
        pass

    def poll(self) -> None:
        written = {path.name for path in self.run.glob("checkpoints/step-*")}
        group = self.executor._groups.get(STEP)
        if group is not self.attempt:
            self.attempt, self.seen, self.is_told = group, written, False
        if self.times and group and written - self.seen and not self.is_told:
            self.is_told = True
            self.times -= 1
            os.kill(group.processes[0].pid, self.number)

    def summary(self, task_name: str, values: Mapping[str, object]) -> None:
        pass

    def close(self) -> None:
        pass


@pytest.fixture
def add_mail(forest, corpora, tmp_path):
    """Add the domain ``mail`` to a copy of the forest, disturbed; returns the outcome and the copy."""

    def _add(number: signal.Signals, times: int, *, max_restarts: int) -> tuple[Outcome, Path]:
        folder = tmp_path / "forest"
        shutil.copytree(forest, folder)
        raw = read_json(folder / "config.json")
        raw["data"]["path"] = str(corpora / "mail.jsonl")
        raw["launch"]["max_restarts"] = max_restarts
        raw["branch"]["optimizer"] = "reset"  # its own schedule, so that it may be longer than those before
        raw["train"] |= {"tokens": 16 * 40_960, "checkpoint_every": 10}
        config = parse_config(raw | {"forest": str(folder), "domain": "mail"})
        steps = plan_add(plan_input(config, ["code", "docs"], []), "mail", num_original_domains=2)
        context = make_context(config, ["code", "docs"], [])
        with LocalExecutor(preload=MODULES) as executor, RunDisplay(Console(quiet=True)) as display:
            tracker = Interference(folder, executor, number, times)
            outcome = Orchestrator(steps, context, executor, display).run(tracker)
        assert tracker.times == 0, "the training was over before it was disturbed"
        return outcome, folder

    return _add


def test_the_exit_code_of_a_preemption_is_the_one_that_workers_give():
    from btm.train import worker

    assert worker.EXIT_PREEMPTED == EXIT_PREEMPTED


def test_preemptions_do_not_use_up_the_restarts(add_mail):
    outcome, folder = add_mail(signal.SIGTERM, 2, max_restarts=0)
    assert outcome.failed == {}
    assert outcome.restarts == {}
    assert "mail" in Forest.open(folder).domains
    log = (folder / "runs" / STEP / "log.txt").read_text()
    assert log.count("stopped on request") == 2
    assert TrainResult.load(folder / "runs" / STEP / "result.json").updates == 160


def test_a_step_that_fails_for_good_shows_its_last_attempt_alone(add_mail):
    outcome, folder = add_mail(signal.SIGKILL, 2, max_restarts=1)
    assert outcome.restarts == {STEP: 1}
    assert (folder / "runs" / STEP / "log.txt").read_text().count(f"training {STEP}") == 2
    assert outcome.failed[STEP].count(f"training {STEP}") == 1
    assert Forest.open(folder).domains == ["code", "docs"]


def test_the_same_command_again_shows_its_own_failure_alone(forest, tmp_path):
    folder, text = tmp_path / "forest", tmp_path / "bad.jsonl"
    shutil.copytree(forest, folder)
    said = []
    for content in ("{bad\n", '{"body": "x"}\n'):
        text.write_text(content)
        done = run_btm("add", f"forest={folder}", "domain=bad", f"data.path={text}", cwd=tmp_path, check=False)
        assert done.returncode == 1
        said.append(done.stderr)
    assert "not valid JSON" in said[0]
    assert "no field 'text'" in said[1]
    assert "not valid JSON" not in said[1]


class Deletion(Interference):
    """A tracker that moves the whole forest away once the worker trains."""

    def poll(self) -> None:
        group, folder = self.executor._groups.get(STEP), self.run.parents[2]
        if self.times and group and (self.run / "metrics.jsonl").is_file():
            self.times -= 1
            self.pids = [process.pid for process in group.processes]
            folder.rename(folder.with_name("elsewhere"))


@pytest.mark.slow
@pytest.mark.parametrize("checkpoint_every", [10, 100_000])
def test_workers_end_at_once_when_the_forest_is_deleted(forest, corpora, tmp_path, checkpoint_every):
    """Also when one has made the directory again meanwhile, by writing a checkpoint."""
    folder = tmp_path / "forest"
    shutil.copytree(forest, folder)
    raw = read_json(folder / "config.json")
    raw["data"]["path"] = str(corpora / "mail.jsonl")
    raw["branch"]["optimizer"] = "reset"
    raw["train"] |= {"tokens": 100 * 40_960, "checkpoint_every": checkpoint_every}
    config = parse_config(raw | {"forest": str(folder), "domain": "mail"})
    steps = plan_add(plan_input(config, ["code", "docs"], []), "mail", num_original_domains=2)
    context = make_context(config, ["code", "docs"], [])
    with LocalExecutor(preload=MODULES) as executor, RunDisplay(Console(quiet=True)) as display:
        tracker = Deletion(folder, executor, signal.SIGKILL, 1)
        with pytest.raises(ForestError, match="was deleted or moved while its run went on"):
            Orchestrator(steps, context, executor, display).run(tracker)
        assert executor.poll()[STEP].state is State.cancelled
        assert not any(os.path.exists(f"/proc/{pid}") for pid in tracker.pids)
    assert checkpoint_every == 10 or not folder.exists()
