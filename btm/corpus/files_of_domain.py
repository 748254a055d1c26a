"""Which files a domain's paths and globs name, in an order that does not depend on the file system."""

import glob
import os
from collections.abc import Sequence
from pathlib import Path

from btm.errors import DataError

COMPRESSIONS = (".gz", ".zst")
LINE_SUFFIXES = (".jsonl", ".json")
TEXT_SUFFIXES = (".txt",)
PARQUET_SUFFIXES = (".parquet",)
_DATASET_FILES = ("state.json", "dataset_dict.json")
_KNOWN = "known are .jsonl, .json, .txt (also .gz, .zst), .parquet, directories of these, and datasets on disk"


def file_kind(path: Path) -> str:
    """Suffix that says how to read ``path``, without compression: ``.jsonl`` for ``a.jsonl.zst``; empty if unknown."""
    name = path.name.lower()
    for compression in COMPRESSIONS:
        if name.endswith(compression):
            name = name.removesuffix(compression)
            return next((suffix for suffix in (*LINE_SUFFIXES, *TEXT_SUFFIXES) if name.endswith(suffix)), "")
    return next((suffix for suffix in (*LINE_SUFFIXES, *TEXT_SUFFIXES, *PARQUET_SUFFIXES) if name.endswith(suffix)), "")


def is_dataset(path: Path) -> bool:
    """Whether ``path`` is a Hugging Face dataset on disk (``save_to_disk``)."""
    return path.is_dir() and any((path / name).is_file() for name in _DATASET_FILES)


def find_files(domain: str, patterns: Sequence[str]) -> list[Path]:
    """Files and dataset directories that ``patterns`` name, each once, in the order of patterns and then of names.

    A path that exists is taken as it is, even when it holds wildcards; directories are searched through and through.

    Raises:
        DataError: If a pattern matches nothing, or names a file of unknown form.
    """
    found: dict[Path, None] = {}
    for pattern in patterns:
        if not pattern or "\0" in pattern:
            raise DataError(f"data of domain {domain}: {pattern!r} is not a path")
        matches = _matches(pattern)
        for path in matches:
            if not path.is_dir() and not file_kind(path):
                raise DataError(f"data of domain {domain}: {path} has an unknown form; {_KNOWN}")
        files = [file for path in matches for file in _files_in(path)]
        if not files:
            raise DataError(f"data of domain {domain}: {pattern!r} matches no text file; {_KNOWN}")
        found.update(dict.fromkeys(files))
    return list(found)


def _matches(pattern: str) -> list[Path]:
    path = Path(pattern).expanduser()
    if path.exists():
        return [path]
    return [Path(name) for name in sorted(glob.glob(str(path), recursive=True))]


def _files_in(path: Path) -> list[Path]:
    if not path.is_dir() or is_dataset(path):
        return [path]
    files: list[Path] = []
    for folder, folders, names in os.walk(path):
        here = Path(folder)
        datasets = sorted(name for name in folders if is_dataset(here / name))
        folders[:] = sorted(name for name in folders if name not in datasets and not name.startswith("."))
        files += [here / name for name in datasets]
        files += [here / name for name in names if not name.startswith(".") and file_kind(Path(name))]
    return sorted(files, key=lambda file: file.parts)
