"""The forest directory: ``forest.json`` plus one Hugging Face directory per ELM, and nothing else that counts.

The manifest is the state (Branch-Train-Merge keeps "the set of ELMs and their metadata"). It is written atomically
under a lock after the files it names are in place, so a kill leaves the forest as it was or with the whole new ELM.
Lineage is a graph: an ELM that was branched from a mixture carries the data of everything in that mixture.
"""

import contextlib
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from btm.errors import ForestError
from btm.files import (
    check_name,
    directory_in_one_step,
    exclusive_lock,
    fsync_directory,
    read_json,
    remove_leftovers,
    sha256_of_file,
    xxh3_of_file,
)
from btm.records import ElmRecord, ForestManifest, Parent

SCHEMA_VERSION = 1
_REQUIRED_FILES = ("config.json",)
_SAFE_SUFFIXES = (".safetensors", ".json", ".txt", ".model", ".md", ".jinja")
"""Weights, configs and tokenizers; code and pickles of an imported model stay outside."""


class Forest:
    """An open forest. Reading needs no lock; whoever changes it holds :meth:`lock`."""

    def __init__(self, path: Path, manifest: ForestManifest) -> None:
        self.path = path
        self.manifest = manifest

    @classmethod
    def exists(cls, path: Path | str) -> bool:
        """Whether ``path`` holds a forest."""
        return (Path(path) / "forest.json").is_file()

    @classmethod
    def open(cls, path: Path | str) -> "Forest":
        """Open the forest in the directory ``path``.

        Raises:
            ForestError: If there is none, it is damaged, or a newer version of this program wrote it.
        """
        path = Path(path)
        if not cls.exists(path):
            raise ForestError(f"{path} holds no forest (no forest.json); `btm run forest={path}` makes one")
        raw = read_json(path / "forest.json")
        version = raw.get("schema_version") if isinstance(raw, dict) else None
        if not isinstance(version, int) or version > SCHEMA_VERSION:
            raise ForestError(
                f"{path}/forest.json has schema version {version!r}, this program reads up to {SCHEMA_VERSION}; "
                "update the program"
            )
        manifest = ForestManifest.load(path / "forest.json")
        _check_manifest(path, manifest)
        return cls(path, manifest)

    @classmethod
    def create(cls, path: Path | str, *, name: str, tokenizer_sha256: str, vocab_size: int) -> "Forest":
        """Create an empty forest; an existing one of the same tokenizer is opened.

        Raises:
            ForestError: If a forest with another tokenizer is there.
        """
        path = Path(path)
        if cls.exists(path):
            forest = cls.open(path)
            if forest.manifest.tokenizer_sha256 != tokenizer_sha256:
                raise ForestError(
                    f"{path} has tokenizer {forest.manifest.tokenizer_sha256[:12]}, got {tokenizer_sha256[:12]}; "
                    "all models of a forest share one tokenizer: use another forest directory"
                )
            return forest
        manifest = ForestManifest(name=check_name(name), tokenizer_sha256=tokenizer_sha256, vocab_size=vocab_size)
        manifest.save(path / "forest.json")
        return cls(path, manifest)

    @staticmethod
    @contextlib.contextmanager
    def lock(path: Path | str) -> Iterator[None]:
        """Hold the right to change the forest at ``path``, for as long as a command runs.

        Raises:
            ForestError: If another process holds it.
        """
        with exclusive_lock(Path(path) / "forest.lock", wait=False):
            yield

    @property
    def tokenizer_dir(self) -> Path:
        """Directory of the shared tokenizer."""
        return self.path / "tokenizer"

    @property
    def domains(self) -> list[str]:
        """Names of the ELMs in manifest order."""
        return [record.domain for record in self.manifest.elms]

    def elm(self, domain: str) -> ElmRecord:
        """Record of one ELM.

        Raises:
            ForestError: If the forest has no such ELM.
        """
        for record in self.manifest.elms:
            if record.domain == domain:
                return record
        raise ForestError(f"the forest {self.path} has no ELM {domain!r}; it has {self.domains or 'none'}")

    def directory(self, domain: str) -> Path:
        """Hugging Face directory of an ELM, or of the seed model for ``"seed"``.

        Raises:
            ForestError: If there is no such model.
        """
        if domain == "seed" and self.manifest.seed:
            return self.path / self.manifest.seed.directory
        return self.path / self.elm(domain).directory

    def join(self, record: ElmRecord, model_dir: Path, *, order: Sequence[str] = ()) -> ElmRecord:
        """Add the model in ``model_dir`` as ``record.domain`` .

        Files of the forest's own runs are hard-linked, those of others are copied.

        Args:
            record: Of the new ELM.
            model_dir: Hugging Face directory.
            order: Domains in the order that their ELMs shall have, whichever joins first; sums of weights round
                differently in another order. A domain that is not among them comes last.

        Returns:
            The record with the directory and the checksums of its files.

        Raises:
            ForestError: If the name is taken by another model, or ``model_dir`` is not a complete model.
        """
        check_name(record.domain)
        if record.domain in ("seed", *self.domains):
            raise ForestError(f"the forest {self.path} already has an ELM {record.domain!r}; remove it first")
        placed = self._place(record, model_dir, Path("elms") / record.domain)
        later = order[order.index(record.domain) + 1 :] if record.domain in order else ()
        at = next((index for index, name in enumerate(self.domains) if name in later), len(self.domains))
        elms = [*self.manifest.elms[:at], placed, *self.manifest.elms[at:]]
        self._write(self.manifest.model_copy(update={"elms": elms}))
        return placed

    def set_seed(self, record: ElmRecord, model_dir: Path) -> ElmRecord:
        """Make the model in ``model_dir`` the forest's seed model.

        Raises:
            ForestError: If the forest has a seed model with other weights.
        """
        if self.manifest.seed:
            if self.manifest.seed.files == file_hashes(model_dir):
                return self.manifest.seed
            raise ForestError(f"the forest {self.path} already has another seed model; use another forest directory")
        placed = self._place(record, model_dir, Path("seed"))
        self._write(self.manifest.model_copy(update={"seed": placed}))
        return placed

    def remove(self, domain: str) -> list[str]:
        """Remove an ELM and its training state; the other ELMs' files are not touched.

        Returns:
            The ELMs whose lineage contains the removed one: their weights still carry its data.

        Raises:
            ForestError: If the forest has no such ELM.
        """
        record = self.elm(domain)
        rest = [other for other in self.manifest.elms if other.domain != domain]
        self._write(self.manifest.model_copy(update={"elms": rest}))
        for leftover in (
            self.path / record.directory,
            self.path / "runs/elm" / domain,
            self.path / "scores/elm" / domain,
        ):
            shutil.rmtree(leftover, ignore_errors=True)
        return [other.domain for other in rest if domain in other.ancestors]

    def ancestors(self, parents: list[Parent]) -> list[str]:
        """Every ELM whose weights reach a model branched from ``parents``."""
        found: set[str] = set()
        for parent in parents:
            if parent.name != "seed" and parent.weight > 0:
                found |= {parent.name, *self.elm(parent.name).ancestors}
        return [name for name in self.domains if name in found] + sorted(found - set(self.domains))

    def damages(self) -> list[str]:
        """Compare every file with its checksum; describe each one that is missing or differs."""
        problems = []
        for record in [*([self.manifest.seed] if self.manifest.seed else []), *self.manifest.elms]:
            directory = self.path / record.directory
            for name, expected in record.files.items():
                if not (directory / name).is_file():
                    problems.append(f"{directory / name} is missing")
                elif sha256_of_file(directory / name) != expected:
                    problems.append(f"{directory / name} does not have the checksum in forest.json")
        return problems

    def clean(self) -> None:
        """Remove what killed writers left behind. Hold :meth:`lock`."""
        # A step that was killed when its result was there already is not done again, and so does not clean up itself.
        deep = [folder for top in ("averages", "scores") for folder in (self.path / top).glob("**/")]
        for folder in (self.path, self.path / "elms", self.path / "merged", *deep):
            if folder.is_dir():
                remove_leftovers(folder)

    def _place(self, record: ElmRecord, model_dir: Path, relative: Path) -> ElmRecord:
        missing = [name for name in _REQUIRED_FILES if not (model_dir / name).is_file()]
        if missing or not list(model_dir.glob("*.safetensors")):
            raise ForestError(f"{model_dir} is not a complete model: needs {_REQUIRED_FILES} and *.safetensors")
        with directory_in_one_step(self.path / relative) as temporary:
            own = model_dir.resolve().is_relative_to(self.path.resolve())
            for file in sorted(model_dir.iterdir()):
                if file.is_file() and file.suffix in _SAFE_SUFFIXES:
                    _place_file(file.resolve(), temporary / file.name, link=own)
        fsync_directory(self.path)
        return record.model_copy(
            update={
                "directory": str(relative),
                "files": file_hashes(self.path / relative),
                "checksums": {file.name: xxh3_of_file(file) for file in (self.path / relative).iterdir()},
            },
        )

    def _write(self, manifest: ForestManifest) -> None:
        manifest.save(self.path / "forest.json")
        self.manifest = manifest


def file_hashes(directory: Path) -> dict[str, str]:
    """SHA-256 of every file directly in ``directory``, by name."""
    return {file.name: sha256_of_file(file) for file in sorted(directory.iterdir()) if file.is_file()}


def weights_sha256(record: ElmRecord) -> str:
    """One hash for the weights of a model, from the checksums in its record."""
    return "-".join(value[:16] for name, value in sorted(record.files.items()) if name.endswith(".safetensors"))


def _check_manifest(path: Path, manifest: ForestManifest) -> None:
    """Refuse names and directories that leave the forest (a forest may come from somebody else)."""
    seen: set[str] = set()
    for record in manifest.elms:
        check_name(record.domain)
        if record.domain in seen:
            raise ForestError(f"{path}/forest.json names the ELM {record.domain!r} twice")
        seen.add(record.domain)
    expected = {"seed": manifest.seed} if manifest.seed else {}
    expected |= {f"elms/{record.domain}": record for record in manifest.elms}
    for directory, record in expected.items():
        if record.directory != directory:
            raise ForestError(f"{path}/forest.json: directory must be {directory!r}, got {record.directory!r}")
        for name in record.files:
            if os.sep in name or name in ("", ".", ".."):
                raise ForestError(f"{path}/forest.json: {name!r} is not a file name")
        folder = path / directory
        if folder.is_symlink() or not folder.is_dir():
            raise ForestError(f"{folder} is missing (or a link), but forest.json names it; restore it from a copy")


def _place_file(source: Path, target: Path, *, link: bool) -> None:
    if link:
        with contextlib.suppress(OSError):
            os.link(source, target)
            return
    shutil.copyfile(source, target)
