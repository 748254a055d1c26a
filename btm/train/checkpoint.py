"""Checkpoints that are whole or absent, and whose damage is always noticed.

``step-NNNNNNNN/`` holds ``model.safetensors`` (fp32 master weights), ``optimizer.safetensors`` (both Adam moments),
``state.json`` (everything else) and ``manifest.json`` with the size of each file and the xxh3 of each tensor. Order of
writing: files, fsync, manifest, fsync, rename of the directory, fsync of its parent. Nothing is loaded before every
byte was compared with the manifest; a damaged checkpoint is renamed ``damaged-step-...`` and the one before it taken.
"""

import errno
import logging
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import xxhash
from pydantic import ValidationError

from btm.errors import TrainingError
from btm.files import directory_in_one_step, fsync_directory, remove_leftovers
from btm.schema import Model
from btm.train.tensor_file import TensorFileDigest, Tensors, damage_of, read_tensors, write_tensors

_PREFIX = "step-"
_DAMAGED_PREFIX = "damaged-"
_MANIFEST = "manifest.json"
_STATE = "state.json"
_FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)

logger = logging.getLogger(__name__)


class Manifest(Model):
    """What a checkpoint must consist of; ``manifest.json`` is its canonical form, so that any changed byte shows."""

    schema_version: int = 1
    update: int
    state_bytes: int
    state_xxh3: str
    tensor_files: dict[str, TensorFileDigest]

    def to_bytes(self) -> bytes:
        """Content of the file: one line of JSON and the xxh3 of it."""
        text = self.model_dump_json().encode()
        return text + b"\n" + xxhash.xxh3_128_hexdigest(text).encode() + b"\n"

    @classmethod
    def from_bytes(cls, content: bytes) -> "Manifest | None":
        """Parse the content of the file; None when it is damaged."""
        text = content.split(b"\n")[0]
        try:
            manifest = cls.model_validate_json(text)
        except ValidationError:
            return None
        return manifest if manifest.to_bytes() == content else None


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """An undamaged checkpoint."""

    path: Path
    update: int
    state: str
    """Content of ``state.json``."""

    def load(self, file_name: str, tensors: Tensors) -> None:
        """Fill ``tensors`` (contiguous, fp32), of divided ones this process's part, from one tensor file.

        Raises:
            CheckpointError: If names or shapes differ.
        """
        read_tensors(self.path / file_name, tensors)


class CheckpointStore:
    """The checkpoints of one run.

    Args:
        directory: ``<run>/checkpoints``.
        keep: Newest checkpoints that are kept.
    """

    def __init__(self, directory: Path, *, keep: int = 2) -> None:
        self.directory = directory
        self._keep = keep

    def clean(self) -> None:
        """Remove what a killed writer left; only for the one process that writes here."""
        if self.directory.is_dir():
            remove_leftovers(self.directory)

    def save(self, update: int, tensor_files: Mapping[str, Tensors], state: str) -> Path:
        """Write the checkpoint of ``update`` and remove the oldest ones beyond ``keep``.

        Args:
            update: Number of the last finished update.
            tensor_files: File name -> tensor name -> contiguous fp32 tensor.
            state: JSON text.

        Raises:
            TrainingError: If the disk is full, over quota or read-only; earlier checkpoints are untouched.
        """
        path = self.path(update)
        try:
            with directory_in_one_step(path) as folder:
                _write_files(folder, update, tensor_files, state)
            self._prune()
        except OSError as error:
            if error.errno not in _FULL_DISK:
                raise
            raise self._full_disk(update, tensor_files, error) from error
        return path

    def path(self, update: int) -> Path:
        """Directory of the checkpoint of ``update``."""
        return self.directory / f"{_PREFIX}{update:08d}"

    def newest(self, *, set_aside: bool) -> Checkpoint | None:
        """The newest undamaged checkpoint; None when there is none. Damaged ones are logged by name.

        Args:
            set_aside: Rename damaged ones, so that they are not tried again; only for the owner of the run.
        """
        for update, path in sorted(self._steps().items(), reverse=True):
            checkpoint = verified(path, update)
            if isinstance(checkpoint, Checkpoint):
                return checkpoint
            logger.warning("checkpoint %s is damaged: %s; the one before it is used", path, checkpoint)
            if set_aside:
                _set_aside(path)
        return None

    def _steps(self) -> dict[int, Path]:
        if not self.directory.is_dir():
            return {}
        paths = self.directory.glob(f"{_PREFIX}*")
        return {int(path.name.removeprefix(_PREFIX)): path for path in paths if _is_step(path)}

    def _prune(self) -> None:
        steps = sorted(self._steps().items(), reverse=True)
        old = [path for _, path in steps[self._keep :]]
        if len(steps) >= self._keep:
            old.extend(self.directory.glob(f"{_DAMAGED_PREFIX}*"))
        for path in old:
            # Renamed first: a kill while files are being removed must not leave something that looks like damage.
            doomed = path.with_name(f".tmp-{path.name}")
            os.rename(path, doomed)
            shutil.rmtree(doomed, ignore_errors=True)

    def _full_disk(self, update: int, tensor_files: Mapping[str, Tensors], error: OSError) -> TrainingError:
        needed = sum(4 * tensor.numel() for tensors in tensor_files.values() for tensor in tensors.values())
        free = shutil.disk_usage(self.directory.parent).free
        return TrainingError(
            f"cannot write the checkpoint of update {update} to {self.directory}: {error.strerror}; it needs "
            f"{needed + (1 << 20)} bytes and {free} are free; earlier checkpoints are untouched: make room (disk, "
            f"quota or file size limit) and run again"
        )


def verified(path: Path, update: int) -> Checkpoint | str:
    """Compare every byte of a checkpoint with its manifest.

    Args:
        path: Directory of the checkpoint.
        update: Number in its name.

    Returns:
        The checkpoint, or what is wrong with it.
    """
    try:
        manifest = Manifest.from_bytes((path / _MANIFEST).read_bytes())
        if manifest is None:
            return f"{_MANIFEST} has changed"
        if manifest.update != update:
            return f"{_MANIFEST} belongs to update {manifest.update}"
        extra = {entry.name for entry in path.iterdir()} - {_MANIFEST, _STATE, *manifest.tensor_files}
        if extra:
            return f"{min(extra)} does not belong to it"
        state = (path / _STATE).read_bytes()
    except OSError as error:
        return f"{Path(error.filename or path).name} cannot be read ({error.strerror})"
    if len(state) != manifest.state_bytes or xxhash.xxh3_128_hexdigest(state) != manifest.state_xxh3:
        return f"{_STATE} has changed"
    for name, expected in manifest.tensor_files.items():
        damage = damage_of(path / name, expected)
        if damage:
            return damage
    return Checkpoint(path, update, state.decode())


def _write_files(folder: Path, update: int, tensor_files: Mapping[str, Tensors], state: str) -> None:
    content = state.encode()
    digests = {name: write_tensors(folder / name, tensors) for name, tensors in tensor_files.items()}
    _write_durably(folder / _STATE, content)
    manifest = Manifest(
        update=update,
        state_bytes=len(content),
        state_xxh3=xxhash.xxh3_128_hexdigest(content),
        tensor_files=digests,
    )
    _write_durably(folder / _MANIFEST, manifest.to_bytes())


def _write_durably(path: Path, content: bytes) -> None:
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _is_step(path: Path) -> bool:
    number = path.name.removeprefix(_PREFIX)
    return len(number) == 8 and number.isascii() and number.isdecimal() and path.is_dir()


def _set_aside(path: Path) -> None:
    target = path.with_name(_DAMAGED_PREFIX + path.name)
    if target.exists():
        shutil.rmtree(target)
    os.rename(path, target)
    fsync_directory(path.parent)
