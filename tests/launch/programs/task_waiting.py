"""Waiting for executors, files and processes, always with an end."""

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import psutil

from launch.task import Executor, Status, Task


def until(condition: Callable[[], Any], *, timeout_s: float = 60.0) -> Any:
    """Return the first true value of ``condition``."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        value = condition()
        if value:
            return value
        time.sleep(0.01)
    raise AssertionError(f"{condition} did not come true in {timeout_s} s")


def finish(executor: Executor, *, timeout_s: float = 120.0) -> Mapping[str, Status]:
    """Poll until every task has ended."""

    def final() -> Mapping[str, Status] | None:
        statuses = executor.poll()
        return statuses if all(status.is_final for status in statuses.values()) else None

    return until(final, timeout_s=timeout_s)


def facts(path: Path, executor: Executor | None = None) -> dict[str, Any]:
    """What a task program has left in ``path``; polls ``executor`` until it is there."""

    def read() -> dict[str, Any] | None:
        if executor:
            executor.poll()
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None

    return until(read)


def is_gone(pid: int) -> bool:
    """Whether no process runs under ``pid`` (a zombie does not run)."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def program(folder: Path, name: str, *arguments: str, **fields: Any) -> Task:
    """A task that runs the task program."""
    given = {"module": "task_program", "log_path": folder / f"{name}.log", **fields}
    return Task(name=name, arguments=arguments, **given)
