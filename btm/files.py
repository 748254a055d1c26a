"""Files that are either whole or absent: atomic writes, checksums, locks and safe names.

Every write goes temp file -> fsync -> rename -> fsync of the parent, so that a process killed at any moment leaves
the old content or the new one, never a mixture. Names of domains and ELMs become file names, hence :func:`check_name`.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from btm.errors import ForestError

_NAME_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_RESERVED_NAMES = re.compile(r"(?i)(con|prn|aux|nul|com[0-9]|lpt[0-9])(\..*)?")
_HASH_CHUNK_BYTES = 1 << 22


def name_problem(name: str) -> str | None:
    """Say what is wrong with ``name`` as the name of a domain, an ELM or a run; None when nothing is."""
    if not _NAME_PATTERN.fullmatch(name) or _RESERVED_NAMES.fullmatch(name):
        return (
            f"{name!r} cannot be a name: use 1 to 64 letters, digits, '.', '_' or '-', beginning with a letter or digit"
        )
    return None


def check_name(name: str) -> str:
    """Return ``name`` when it is safe as a file name.

    Raises:
        ForestError: If it is not.
    """
    problem = name_problem(name)
    if problem:
        raise ForestError(problem)
    return name


def fsync_directory(path: Path) -> None:
    """Make renames inside the directory ``path`` durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomic(path: Path, content: bytes | str) -> None:
    """Replace the file ``path`` by ``content`` in one step (text is written as UTF-8)."""
    data = content.encode() if isinstance(content, str) else content
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(prefix=f".tmp-{path.name}-", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
    fsync_directory(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Replace ``path`` by ``value`` as indented JSON; NaN and infinities are refused."""
    write_atomic(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Read one JSON file.

    Raises:
        ForestError: If it is missing or not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ForestError(f"{path} does not exist") from None
    except (ValueError, UnicodeDecodeError) as error:
        raise ForestError(f"{path} is not valid JSON ({error}); restore it from a copy") from None


@contextlib.contextmanager
def directory_in_one_step(path: Path) -> Iterator[Path]:
    """Yield an empty temporary directory beside ``path`` that becomes ``path`` when the block ends well.

    An existing ``path`` is replaced. All files are fsynced before the rename; when the block raises, nothing changes.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".tmp-{path.name}-", dir=path.parent))
    os.chmod(temporary, 0o777 & ~_umask())
    try:
        yield temporary
        _fsync_tree(temporary)
        if path.exists():
            retired = temporary.with_name(temporary.name + "-old")
            os.rename(path, retired)
            os.rename(temporary, path)
            shutil.rmtree(retired)
        else:
            os.rename(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    fsync_directory(path.parent)


def remove_leftovers(directory: Path) -> None:
    """Delete the temporary files and directories that a killed writer left in ``directory``.

    Call it only while no other process writes there.
    """
    for leftover in directory.glob(".tmp-*"):
        if leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)


def identity_of(directory: Path) -> tuple[int, int] | None:
    """What tells a directory from another one of the same name; None when there is none.

    Looks twice where there seems to be none: a file server may forget for a moment what it has.
    """
    for pause_s in (1.0, 0.0):
        try:
            status = directory.stat()
        except (FileNotFoundError, NotADirectoryError):
            time.sleep(pause_s)
        else:
            return status.st_dev, status.st_ino
    return None


def sha256_of_file(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's bytes, read in chunks."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(_HASH_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def xxh3_of_file(path: Path) -> str:
    """Hexadecimal XXH3-128 of a file's bytes: notices damage at the speed of memory, proves nothing about origin."""
    import xxhash

    digest = xxhash.xxh3_128()
    with open(path, "rb") as file:
        while chunk := file.read(_HASH_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def sha256_of_json(value: Any) -> str:
    """Hexadecimal SHA-256 of a JSON value, independent of key order."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


@contextlib.contextmanager
def exclusive_lock(path: Path, *, wait: bool = True) -> Iterator[None]:
    """Hold the advisory lock on the file ``path``; the kernel releases it when the process dies.

    Raises:
        ForestError: If ``wait`` is False and another process holds it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise ForestError(f"another process holds {path}; wait for it to end, or stop it, and try again") from None
        yield


def _fsync_tree(directory: Path) -> None:
    for folder, _, names in os.walk(directory):
        for name in names:
            descriptor = os.open(os.path.join(folder, name), os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        fsync_directory(Path(folder))


def _umask() -> int:
    current = os.umask(0o077)
    os.umask(current)
    return current
