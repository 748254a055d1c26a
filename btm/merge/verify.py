"""Compare the files of a model with its record before anything is read from them."""

import hashlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from btm.errors import MergeError
from btm.merge.model_files import ModelFiles
from btm.requests import MergeInput

_READ_BYTES = 256 << 10


def check_recorded(models: Sequence[ModelFiles], records: Sequence[MergeInput], num_threads: int) -> None:
    """Hash every recorded file; models without a record are taken as they are.

    Args:
        models: What will be averaged.
        records: Of the same models; a file's XXH3-128 is compared where it is known, otherwise its SHA-256.
        num_threads: Files hashed at the same time.

    Raises:
        MergeError: Naming a file that is missing, changed, or not in the record.
    """
    jobs: list[tuple[Path, str, Callable[[], Any]]] = []
    for model, record in zip(models, records, strict=True):
        known = record.files | record.checksums
        for path in model.weight_files if known else []:
            if path.name not in known:
                raise MergeError(f"{path} is not in the record of model {model.name!r}; restore the model from a copy")
        for name, expected in known.items():
            make = _xxh3 if name in record.checksums else hashlib.sha256
            jobs.append((model.directory / name, expected, make))
    with ThreadPoolExecutor(num_threads) as pool:
        for _ in pool.map(lambda job: _check_file(*job), sorted(jobs, key=lambda job: -_size(job[0]))):
            pass


def _check_file(path: Path, expected: str, make: Callable[[], Any]) -> None:
    if not path.is_file():
        raise MergeError(f"{path} is missing, but the record names it; restore it from a copy")
    found = _hash(path, make)
    if found != expected:
        raise MergeError(f"{path} has changed: its hash is {found}, the record says {expected}; restore it from a copy")


def _xxh3() -> Any:
    import xxhash

    return xxhash.xxh3_128()


def _hash(path: Path, make: Callable[[], Any]) -> str:
    digest, buffer = make(), memoryview(bytearray(_READ_BYTES))
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
    return digest.hexdigest()


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0
