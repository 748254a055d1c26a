"""Mirrors of the metrics: Weights & Biases, one group per forest and one run per task.

The JSON lines that workers write are the truth; a mirror follows them from the driver and can be replayed: delete
``tracking.json`` in the forest and run again. That file keeps how far each task was sent and the forest's random id,
from which the run ids come, so that a restarted driver continues the same runs. Keys come from the environment only
(``WANDB_API_KEY``, or what ``wandb login`` left); values that look like secrets are never sent.
"""

import contextlib
import hashlib
import netrc
import os
import secrets
import time
import urllib.parse
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from btm.config_launch import TrackerName, TrackingConfig
from btm.errors import ConfigError, ForestError
from btm.files import read_json, write_json
from btm.metrics import MetricsTail, Row, is_dev_row, update_of
from btm.redaction import redact

_SAVE_INTERVAL_S = 5.0
_OPEN_TIMEOUT_S = 20.0
"""The driver waits no longer than this for a run to open; workers never wait."""


class Tracker(Protocol):
    """Receives what a run does. No call raises because of the service behind it."""

    def follow(self, task_name: str, metrics_path: Path, config: Mapping[str, Any]) -> None:
        """Mirror the metrics file of a task from now on; a task that is followed already stays as it is."""
        ...

    def poll(self) -> None:
        """Send the rows that appeared since the last call."""
        ...

    def summary(self, task_name: str, values: Mapping[str, Any]) -> None:
        """Set final values of a task (perplexities, the ledger)."""
        ...

    def close(self) -> None:
        """Send what is left and end all runs. Idempotent."""
        ...


class TrackedRun(Protocol):
    """One run at a tracking service."""

    def log(self, row: Mapping[str, Any], step: int) -> None:
        """Send one row; steps never fall."""
        ...

    def summary(self, values: Mapping[str, Any]) -> None:
        """Set final values."""
        ...

    def finish(self) -> None:
        """End the run."""
        ...


@dataclass(frozen=True, slots=True)
class RunIdentity:
    """What a tracked run is called."""

    run_id: str
    """Same for the same task of the same forest, whichever driver asks."""
    group: str
    """Name of the forest."""
    name: str
    """Name of the task."""


RunOpener = Callable[[RunIdentity, Mapping[str, Any]], TrackedRun]


class NoTracker:
    """Mirrors nothing."""

    def follow(self, task_name: str, metrics_path: Path, config: Mapping[str, Any]) -> None:
        """Do nothing."""

    def poll(self) -> None:
        """Do nothing."""

    def summary(self, task_name: str, values: Mapping[str, Any]) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""


@dataclass(slots=True)
class _Followed:
    tail: MetricsTail
    run: TrackedRun
    sent: dict[str, int]
    """Kind of row (``train``, ``dev``) -> last update sent."""


class MetricsMirror:
    """Follows metrics files and sends every row once to a tracking service.

    A service that fails is reported once as a warning and left alone; workers never wait for it.

    Args:
        open_run: Opens or continues the run of a task at the service.
        forest_name: Becomes the group.
        forest_dir: Holds ``tracking.json``.
    """

    def __init__(self, open_run: RunOpener, *, forest_name: str, forest_dir: Path) -> None:
        self._open_run = open_run
        self._forest_name = forest_name
        self._state_path = forest_dir / "tracking.json"
        self._forest_id, self._sent = _load_state(self._state_path)
        self._followed: dict[str, _Followed] = {}
        self._failed: set[str] = set()
        self._unsaved = False
        self._saved_at = 0.0
        self._save()

    def run_id(self, task_name: str) -> str:
        """Id of a task's run: 16 hexadecimal digits of forest and task."""
        return hashlib.sha256(f"{self._forest_id}/{task_name}".encode()).hexdigest()[:16]

    def follow(self, task_name: str, metrics_path: Path, config: Mapping[str, Any]) -> None:
        """Open (or continue) the run of a task and mirror its metrics file."""
        if task_name in self._followed or task_name in self._failed:
            return
        identity = RunIdentity(run_id=self.run_id(task_name), group=self._forest_name, name=task_name)
        with self._guard(task_name):
            run = self._open_run(identity, redact(config))
            sent = self._sent.setdefault(task_name, {})
            self._followed[task_name] = _Followed(MetricsTail(metrics_path), run, sent)

    def poll(self) -> None:
        """Send new rows of all followed tasks and, every few seconds, note how far they were sent."""
        for task_name, followed in list(self._followed.items()):
            with self._guard(task_name):
                for row in followed.tail.read():
                    self._send(followed, row)
        if self._unsaved and time.monotonic() - self._saved_at >= _SAVE_INTERVAL_S:
            self._save()

    def summary(self, task_name: str, values: Mapping[str, Any]) -> None:
        """Set final values of a followed task; others are ignored."""
        if followed := self._followed.get(task_name):
            with self._guard(task_name):
                followed.run.summary(redact(values))

    def close(self) -> None:
        """Send what is left and end all runs."""
        self.poll()
        for task_name in list(self._followed):
            with self._guard(task_name):
                self._followed.pop(task_name).run.finish()
        if self._unsaved:
            self._save()

    @contextlib.contextmanager
    def _guard(self, task_name: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self._followed.pop(task_name, None)
            self._failed.add(task_name)
            warnings.warn(
                f"tracking of {task_name} stopped ({type(error).__name__}: {redact(str(error))}); "
                "its metrics.jsonl is complete and can be replayed",
                stacklevel=4,
            )

    def _send(self, followed: _Followed, row: Row) -> None:
        update = update_of(row)
        kind = "dev" if is_dev_row(row) else "train"
        # A worker that continues from its checkpoint writes the updates since then again.
        if update is None or update <= followed.sent.get(kind, -1):
            return
        followed.run.log(redact(row), max([update, *followed.sent.values()]))
        followed.sent[kind] = update
        self._unsaved = True

    def _save(self) -> None:
        write_json(self._state_path, {"forest_id": self._forest_id, "sent": self._sent})
        self._unsaved, self._saved_at = False, time.monotonic()


def make_tracker(config: TrackingConfig, *, forest_name: str, forest_dir: Path) -> Tracker:
    """Tracker that the configuration asks for; ``none`` imports nothing.

    Raises:
        ConfigError: If W&B is to run online and no key is in the environment.
    """
    if config.name is TrackerName.none:
        return NoTracker()
    if config.mode == "online" and not _has_wandb_key():
        raise ConfigError(
            [
                "tracking.mode=online needs a key: set WANDB_API_KEY in the environment or run `wandb login`; "
                "tracking.mode=offline needs none"
            ]
        )
    opener = _wandb_opener(config, forest_dir)
    return MetricsMirror(opener, forest_name=forest_name, forest_dir=forest_dir)


class _WandbRun:
    def __init__(self, run: Any) -> None:
        self._run = run

    def log(self, row: Mapping[str, Any], step: int) -> None:
        self._run.log(dict(row), step=step)

    def summary(self, values: Mapping[str, Any]) -> None:
        self._run.summary.update(dict(values))

    def finish(self) -> None:
        self._run.finish()


def _wandb_opener(config: TrackingConfig, forest_dir: Path) -> RunOpener:
    def open_run(identity: RunIdentity, run_config: Mapping[str, Any]) -> TrackedRun:
        import wandb

        run = wandb.init(
            project=config.project,
            entity=config.entity,
            group=identity.group,
            name=identity.name,
            id=identity.run_id,
            resume="allow",
            reinit="create_new",
            mode=config.mode,
            dir=str(forest_dir),
            config=dict(run_config),
            # Host, command line and environment of the driver say nothing about a task and may hold private paths.
            settings=wandb.Settings(
                console="off",
                silent=True,
                x_disable_meta=True,
                x_disable_stats=True,
                x_disable_machine_info=True,
                disable_git=True,
                disable_code=True,
                init_timeout=_OPEN_TIMEOUT_S,
            ),
        )
        return _WandbRun(run)

    return open_run


def _has_wandb_key() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urllib.parse.urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        return netrc.netrc().authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def _load_state(path: Path) -> tuple[str, dict[str, dict[str, int]]]:
    fresh = secrets.token_hex(8)
    try:
        raw = read_json(path)
        sent = {task: {kind: int(update) for kind, update in kinds.items()} for task, kinds in raw["sent"].items()}
        return str(raw["forest_id"]), sent
    except (ForestError, KeyError, TypeError, ValueError, AttributeError):
        return fresh, {}
