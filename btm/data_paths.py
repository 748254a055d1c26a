"""Turn ``data.directory`` into domains: every file and folder in it becomes one, named after it."""

from pathlib import Path
from typing import Any

from btm.errors import ConfigError

_SUFFIXES = (".jsonl", ".json", ".txt", ".parquet", ".gz", ".zst")


def expand_directories(raw: dict[str, Any]) -> dict[str, Any]:
    """Return ``raw`` with ``data.directory`` and ``data.novel_directory`` listed under ``domains`` and ``novel``.

    Raises:
        ConfigError: If a directory does not exist or holds no text files.
    """
    data = dict(raw.get("data") or {})
    problems = []
    for key, group in (("directory", "domains"), ("novel_directory", "novel")):
        path = data.get(key)
        if path is None:
            continue
        found = domains_in(Path(str(path))) if Path(str(path)).is_dir() else {}
        if not found:
            problems.append(f"data.{key} must be a directory that holds text files or folders of them, got {path!r}")
        data[group] = {**found, **(data.get(group) or {})}
        data[key] = None
    if problems:
        raise ConfigError(problems)
    return {**raw, "data": data}


def domains_in(directory: Path) -> dict[str, str]:
    """Name -> path of every text file and folder directly in ``directory``, in alphabetical order."""
    return {
        _stem(entry.name): str(entry)
        for entry in sorted(directory.iterdir())
        if not entry.name.startswith(".") and (entry.is_dir() or entry.suffix in _SUFFIXES)
    }


def _stem(name: str) -> str:
    while (suffix := Path(name).suffix) in _SUFFIXES:
        name = name.removesuffix(suffix)
    return name
