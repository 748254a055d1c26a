"""Small JSON files on the shared file system through which driver and jobs speak."""

import json
import os
import urllib.parse
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class StateDir:
    """Directory of one run's requests and outcomes."""

    path: Path

    @property
    def outcomes(self) -> Path:
        """Directory of the outcomes."""
        return self.path / "outcomes"

    def request(self, task_name: str) -> Path:
        """What the job of a task is asked to run."""
        return self.path / "requests" / f"{urllib.parse.quote(task_name, safe='')}.json"

    def outcome(self, job_id: int) -> dict[str, Any]:
        """What a job said about itself; empty when it has said nothing."""
        return read_json(outcome_path(self.outcomes, job_id))


def outcome_path(outcome_dir: Path, job_id: int) -> Path:
    """Where job ``job_id`` says how it went."""
    return outcome_dir / f"{job_id}.json"


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Replace ``path`` in one step: whole or absent, and durable when this returns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with open(temporary, "w", encoding="utf-8") as file:
        json.dump(value, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def read_json(path: Path) -> dict[str, Any]:
    """The object in ``path``; empty when there is none that can be read."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
