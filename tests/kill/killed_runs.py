"""`btm run`, killed again and again: finds our own processes, picks the moment, counts what it cost."""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from file_events import TreeWatch

DIES_WITH_DRIVER_S = 30.0
_RUN_S = 200.0


@dataclass(frozen=True, slots=True)
class Aim:
    """What to kill, and when."""

    victim: str
    """driver, worker, fork server, actor or raylet."""
    moment: str
    """random, checkpoint, manifest, result or merge."""

    def __str__(self) -> str:
        return f"{self.victim}, {'at random' if self.moment == 'random' else 'writing a ' + self.moment}"


@dataclass(slots=True)
class Cost:
    """What kills of one kind did."""

    kills: int = 0
    inside: int = 0
    """Kills that left a half-written file or directory."""
    driver_starts: int = 0
    updates_twice: int = 0
    seconds: float = 0.0


@dataclass(slots=True)
class KilledRun:
    """Runs one command to its end while killing its processes.

    Args:
        command: Of the driver.
        forest: What it writes.
        env: Its environment.
        aims: Kills that are wanted; each happens once, when its moment comes.
        generator: Source of everything random.
    """

    command: Sequence[str]
    forest: Path
    env: dict[str, str]
    aims: list[Aim]
    generator: random.Random
    log: Path = field(init=False)
    costs: dict[Aim, Cost] = field(init=False, default_factory=dict)
    driver_starts: int = field(init=False, default=0)
    seconds: float = field(init=False, default=0.0)
    _logs: dict[psutil.Process, str] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self.forest.mkdir(parents=True, exist_ok=True)
        self.log = self.forest.with_name(self.forest.name + ".log")

    def run(self) -> None:
        """Start the command until it ends well, killing on the way."""
        began = time.monotonic()
        while not self._one_life():
            assert time.monotonic() - began < 2 * _RUN_S, self.log.read_text()[-3000:]
        self.seconds = time.monotonic() - began

    def _one_life(self) -> bool:
        """One driver from start to end; True when it ended well."""
        self.driver_starts += 1
        watch = TreeWatch(self.forest)
        with open(self.log, "ab") as log:
            driver = psutil.Popen(
                self.command, cwd=self.forest.parent, env=self.env, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        try:
            was_disturbed = self._disturb(driver, watch)
            code = driver.wait(_RUN_S)
        finally:
            watch.close()
            with contextlib.suppress(psutil.NoSuchProcess):
                for process in [*descendants(driver), driver]:
                    process.kill()
        assert code == 0 or was_disturbed, f"exit code {code}\n{self.log.read_text()[-3000:]}"
        return code == 0

    def _disturb(self, driver: psutil.Popen, watch: TreeWatch) -> bool:
        """Kill what comes before the sights; returns whether the driver may have ended because of it."""
        deadline = time.monotonic() + _RUN_S
        next_random = self._draw_time()
        was_disturbed = False
        while driver.poll() is None:
            assert time.monotonic() < deadline, f"the driver hangs\n{self.log.read_text()[-3000:]}"
            aim, path = None, None
            self._look_for_workers(driver)
            for path in watch.wait(min(0.2, max(0.0, next_random - time.monotonic()))):
                aim = self._aim_at(path)
                if aim and self._kill(driver, aim, path):
                    break
                aim = None
            if aim is None and time.monotonic() >= next_random:
                next_random = self._draw_time()
                # Preparing is the first and longest step: most kills are for what comes behind it.
                trains = any("/runs/prepare/" not in log for log in self._logs.values())
                aim = self._any_aim("random") if trains or (self._logs and self.generator.random() < 0.15) else None
                if aim and not self._kill(driver, aim, None):
                    aim = None
            if aim is None:
                continue
            was_disturbed = was_disturbed or aim.victim != "worker"
            if aim.victim == "driver":
                return True
        return was_disturbed

    def _draw_time(self) -> float:
        return time.monotonic() + self.generator.uniform(0.5, 3.0)

    def _aim_at(self, path: Path) -> Aim | None:
        moment = moment_of(path, self.forest)
        # Half of the chances are let pass, so that the kills spread over the run.
        return self._any_aim(moment) if moment and (moment == "manifest" or self.generator.random() < 0.5) else None

    def _any_aim(self, moment: str) -> Aim | None:
        fitting = [aim for aim in self.aims if aim.moment == moment]
        return self.generator.choice(fitting) if fitting else None

    def _kill(self, driver: psutil.Popen, aim: Aim, path: Path | None) -> bool:
        """Kill the victim; False when there was none."""
        victims = self._victims(driver, aim.victim, path)
        if not victims:
            return False
        victim = self.generator.choice(victims)
        if path is not None:
            time.sleep(self.generator.choice([0.0, 0.0, 0.0005, 0.002]))
        began = time.monotonic()
        try:
            # Stopped first: what it does ends here, and there is time to look for its children.
            os.kill(victim.pid, signal.SIGSTOP)
            family = descendants(victim)
            os.kill(victim.pid, signal.SIGKILL)
        except ProcessLookupError:
            return False
        self._assert_dead([victim, *family])
        cost = self.costs.setdefault(aim, Cost())
        cost.kills += 1
        cost.driver_starts += aim.victim == "driver"
        cost.inside += path is not None and path.exists()
        cost.seconds += time.monotonic() - began
        dead_logs = {path for process, path in self._logs.items() if process in (victim, *family)}
        cost.updates_twice += sum(lost_updates(Path(log).parent) for log in dead_logs)
        self.aims.remove(aim)
        return True

    def _victims(self, driver: psutil.Popen, victim: str, path: Path | None) -> list[psutil.Process]:
        if victim == "driver":
            return [driver]
        if victim == "worker":
            if path and not self._workers_of(path):
                self._look_for_workers(driver)
            return self._workers_of(path)
        marks = {"fork server": "launch.forkserver", "actor": "ray::Supervisor", "raylet": "raylet/raylet"}
        # Children that the fork server has forked carry its command line: they write to a log.
        return [
            process
            for process in descendants(driver)
            if process not in self._logs and marks[victim] in command_line(process) and has_children(process)
        ]

    def _look_for_workers(self, driver: psutil.Popen) -> None:
        self._logs = {process: log for process in descendants(driver) if (log := log_of(process, self.forest))}

    def _workers_of(self, path: Path | None) -> list[psutil.Process]:
        """Workers of the step that writes ``path``; all for None."""
        step = step_of(path, self.forest) if path else ""
        return [process for process, log in self._logs.items() if f"/runs/{step}" in log]

    def _assert_dead(self, processes: Sequence[psutil.Process]) -> None:
        deadline = time.monotonic() + DIES_WITH_DRIVER_S
        left = list(processes)
        while left := [process for process in left if is_alive(process)]:
            assert time.monotonic() < deadline, f"still alive: {[command_line(process) for process in left]}"
            time.sleep(0.01)


def btm_command(*arguments: str) -> list[str]:
    """The command line of ``btm``."""
    return [sys.executable, "-m", "btm.cli", *arguments]


def descendants(process: psutil.Process) -> list[psutil.Process]:
    """Children of ours, and theirs."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.children(recursive=True)
    return []


def has_children(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return bool(process.children())
    return False


def is_alive(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def command_line(process: psutil.Process) -> str:
    with contextlib.suppress(psutil.Error):
        return " ".join(process.cmdline())
    return ""


def log_of(process: psutil.Process, forest: Path) -> str | None:
    """The log that a worker of this forest writes to; None for other processes."""
    with contextlib.suppress(OSError):
        target = os.readlink(f"/proc/{process.pid}/fd/1")
        if target.startswith(f"{forest}/runs/") and target.endswith("/log.txt"):
            return target
    return None


def moment_of(path: Path, forest: Path) -> str | None:
    """What is being written when ``path`` appears."""
    name, parts = path.name, path.relative_to(forest).parts
    if name.startswith(".tmp-step-"):
        return "checkpoint"
    if name.startswith(".tmp-forest.json") or (name.startswith(".tmp-") and parts[0] in ("elms", ".tmp-seed")):
        return "manifest"
    if name.startswith(".tmp-experts.json"):
        return "manifest"
    if name.startswith(".tmp-") and parts[0] == "experts":
        return "result"
    if name.startswith(".tmp-result.json") or name.startswith(".tmp-model-"):
        return "result"
    if name.startswith(".tmp-") and parts[0] == "averages":
        return "merge"
    return None


def step_of(path: Path, forest: Path) -> str:
    """Name of the step whose worker writes ``path`` (its beginning, where that is all that the path tells)."""
    parts = path.relative_to(forest).parts
    if parts[0] == "averages":
        return "average"
    if parts[0] == "experts":
        return "grow"
    if parts[0] == "scores":
        return "score/" + "/".join(parts[1:-1])
    inner = [part for part in parts[1:-1] if part != "checkpoints"]
    return "/".join(inner)


def lost_updates(run: Path) -> int:
    """Updates of a training that were done but are in no checkpoint."""
    try:
        lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    except OSError:
        return 0
    updates = [json.loads(line)["update"] for line in lines if line.endswith("\n")]
    saved = [int(path.name.removeprefix("step-")) for path in run.glob("checkpoints/step-*")]
    return max(updates) - max([*saved, min(updates) - 1]) if updates else 0


def table(run: KilledRun) -> str:
    """Kind of kill -> how often, and what it cost."""
    head = ("kind of kill", "kills", "inside a write", "driver starts", "updates done twice", "s to die")
    restarts = run.log.read_text(errors="replace").count("from its checkpoint")
    rows = [
        (str(aim), cost.kills, cost.inside, cost.driver_starts, cost.updates_twice, f"{cost.seconds:.1f}")
        for aim, cost in sorted(run.costs.items(), key=lambda item: str(item[0]))
    ]
    totals = [sum(row[column] for row in rows) for column in range(1, 5)]
    rows.append(("all", *totals, ""))
    lines = [f"{row[0]:<28}" + "".join(f"{value!s:>20}" for value in row[1:]) for row in (head, *rows)]
    lines.append(f"driver started {run.driver_starts} times, {restarts} restarts by it, {run.seconds:.0f} s")
    return "\n".join(lines)
