"""The one model of a sparse run as domains join and leave it, and the requests for the work on its experts.

``btm run ffn=demix`` leaves ``runs/sparse/model``. A domain that joins or leaves makes a new model of it, written whole
under ``experts/`` before ``experts.json`` names it; that file is replaced in one step, so a kill leaves the old model
or the new one. What a leaving domain had is deleted afterwards, by the next command if this one is killed.
"""

import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from btm.errors import ForestError
from btm.files import check_name, read_json, remove_leftovers, sha256_of_json
from btm.records import Ledger, StoredModel, TrainResult
from btm.requests import ScoreSource, SpecModel
from btm.schema import Model

SCHEMA_VERSION = 1
FIRST_MODEL = "runs/sparse/model"
_FILE, _FOLDER = "experts.json", "experts"
_NAME_LENGTH = 16


class DomainExperts(Model):
    """The experts of one domain."""

    domain: str
    weights: str
    """Names the weights that tokens of the domain meet: which training, which domain. Those of the others joining or
    leaving do not change it, and so neither its scores."""
    ancestors: list[str] = []
    """Domains whose experts these began as copies of, directly or not."""
    ledger: Ledger = Ledger()
    """Cost of experts that joined later."""


class SparseManifest(StoredModel):
    """``experts.json``: which model counts, and whose experts it has."""

    schema_version: Literal[1] = SCHEMA_VERSION
    model: str
    """Directory relative to the forest."""
    experts: list[DomainExperts]
    """In the order of the model's domain ids."""
    leaving: list[str] = []
    """Removed domains whose files are still to be deleted."""


class ExpertsResult(StoredModel):
    """What was done to the experts of a model."""

    spec_sha256: str
    like: str | None = None
    """Domain whose experts the new ones were copied from."""
    weights: str = ""
    """Of that domain."""
    ancestors: list[str] = []
    """Of the new domain."""
    posterior: dict[str, float] = {}
    """Mean posterior of each domain on dev documents of the new one."""
    seconds: float = 0.0


class ExpertsSpec(SpecModel):
    """Ask for a model with other experts; the answer is the directory ``output_dir`` and ``<output_dir>.json``.

    ``branch``: a model with experts of ``domain`` alone, copies of the likeliest domain's on ``dev``.
    ``join``: the model with those of ``trained_dir`` besides its own.
    ``leave``: the model without those of ``domain``.
    """

    action: Literal["branch", "join", "leave"]
    domain: str
    model_dir: str
    experts: list[DomainExperts]
    """Those of the model, so that a changed one is noticed."""
    dev: ScoreSource | None = None
    sequence_length: int = 0
    batch_sequences: int = 1
    trained_dir: str | None = None
    trained_sha256: str = ""
    tokenizer_dir: str
    output_dir: str


class SparseModels:
    """The model of a sparse run as it is now. Whoever changes it holds the forest's lock."""

    def __init__(self, forest_dir: Path, manifest: SparseManifest) -> None:
        self.forest_dir = forest_dir
        self.manifest = manifest

    @classmethod
    def open(cls, forest_dir: Path | str) -> "SparseModels":
        """Open what is in a forest directory.

        Raises:
            ForestError: If no model is trained there, or ``experts.json`` is damaged.
        """
        forest_dir = Path(forest_dir)
        if not (forest_dir / _FILE).is_file():
            return cls(forest_dir, _first(forest_dir))
        version = _field(read_json(forest_dir / _FILE), "schema_version")
        if not isinstance(version, int) or version > SCHEMA_VERSION:
            raise ForestError(
                f"{forest_dir / _FILE} has schema version {version!r}, this program reads up to {SCHEMA_VERSION}; "
                "update the program"
            )
        manifest = SparseManifest.load(forest_dir / _FILE)
        _check(forest_dir, manifest)
        return cls(forest_dir, manifest)

    @property
    def directory(self) -> Path:
        """Of the model."""
        return self.forest_dir / self.manifest.model

    @property
    def domains(self) -> list[str]:
        """Names of the domains with experts, in the order of their ids."""
        return [experts.domain for experts in self.manifest.experts]

    def experts(self, domain: str) -> DomainExperts:
        """Those of one domain.

        Raises:
            ForestError: If the model has none.
        """
        for experts in self.manifest.experts:
            if experts.domain == domain:
                return experts
        raise ForestError(
            f"the model of {self.forest_dir} has no experts of domain {domain!r}; it has those of {self.domains}: name "
            f"one of these, or let it join by `btm add domain={domain} data.path=...`"
        )

    def directory_for(self, experts: Sequence[DomainExperts]) -> Path:
        """Where the model with these experts belongs; the same ones always have the same place."""
        name = sha256_of_json([[one.domain, one.weights] for one in experts])[:_NAME_LENGTH]
        return self.forest_dir / _FOLDER / name

    def with_domain(self, new: DomainExperts) -> list[DomainExperts]:
        """The experts when those of one more domain have joined.

        Raises:
            ForestError: If the domain has some already.
        """
        check_name(new.domain)
        if new.domain in self.domains:
            raise ForestError(
                f"the model of {self.forest_dir} already has experts of domain {new.domain!r}; remove them first"
            )
        return [*self.manifest.experts, new]

    def without_domain(self, domain: str) -> list[DomainExperts]:
        """The experts when those of one domain have left.

        Raises:
            ForestError: If there are none of this domain, or no others.
        """
        self.experts(domain)
        if self.domains == [domain]:
            raise ForestError(
                f"domain {domain!r} is the last one of the model of {self.forest_dir}; add another one first"
            )
        return [experts for experts in self.manifest.experts if experts.domain != domain]

    def publish(self, experts: Sequence[DomainExperts]) -> None:
        """Let the model with these experts, which is in its place already, be the one that counts.

        Raises:
            ForestError: If it is not there.
        """
        directory = self.directory_for(experts)
        kept = {one.domain for one in experts}
        manifest = SparseManifest(
            model=directory.relative_to(self.forest_dir).as_posix(),
            experts=list(experts),
            leaving=[domain for domain in self.domains if domain not in kept],
        )
        _check(self.forest_dir, manifest)
        self._write(manifest)
        self.clean()

    def clean(self) -> None:
        """Delete what left the model and what killed commands left behind."""
        remove_leftovers(self.forest_dir)
        if self.manifest.leaving:
            for domain in self.manifest.leaving:
                for folder in ("runs/expert", "runs/branch", "runs/grow", "scores/sparse"):
                    shutil.rmtree(self.forest_dir / folder / domain, ignore_errors=True)
            if set(self.manifest.leaving) & set(_domains_in(self.forest_dir / FIRST_MODEL)):
                # The model last: it says whether there is something to delete.
                for folder in ("runs/sparse/checkpoints", FIRST_MODEL):
                    shutil.rmtree(self.forest_dir / folder, ignore_errors=True)
            self._write(self.manifest.model_copy(update={"leaving": []}))
        for domain in self.domains:
            # Holds copies of another domain's experts.
            shutil.rmtree(self.forest_dir / "runs/branch" / domain, ignore_errors=True)
        folder = self.forest_dir / _FOLDER
        if not folder.is_dir():
            return
        remove_leftovers(folder)
        for path in folder.iterdir():
            if path.name.removesuffix(".json") != self.directory.name:
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    def _write(self, manifest: SparseManifest) -> None:
        manifest.save(self.forest_dir / _FILE)
        self.manifest = manifest


def _first(forest_dir: Path) -> SparseManifest:
    """What ``btm run`` left."""
    model, result = forest_dir / FIRST_MODEL, forest_dir / "runs/sparse/result.json"
    if not (model / "config.json").is_file() or not result.is_file():
        raise ForestError(f"{forest_dir} has no trained sparse model yet; `btm run forest={forest_dir}` trains it")
    trained = TrainResult.load(result).spec_sha256
    return SparseManifest(
        model=FIRST_MODEL,
        experts=[DomainExperts(domain=name, weights=f"{trained}/{name}") for name in _domains_in(model)],
    )


def _domains_in(model_dir: Path) -> list[str]:
    """Domains of a sparse model, from its description; none where there is no model."""
    if not (model_dir / "config.json").is_file():
        return []
    domains = _field(_field(read_json(model_dir / "config.json"), "btm"), "domains")
    return [check_name(str(name)) for name in domains] if isinstance(domains, list) else []


def _check(forest_dir: Path, manifest: SparseManifest) -> None:
    """Refuse names and directories that leave the forest, and a model that is not there."""
    domains = [check_name(experts.domain) for experts in manifest.experts]
    for domain in manifest.leaving:
        check_name(domain)
    if len(set(domains)) != len(domains) or not domains:
        raise ForestError(f"{forest_dir / _FILE} must name at least one domain and each once, got {domains}")
    if not re.fullmatch(rf"{FIRST_MODEL}|{_FOLDER}/[0-9a-f]{{{_NAME_LENGTH}}}", manifest.model):
        raise ForestError(f"{forest_dir / _FILE}: model must be a directory under {_FOLDER}/, got {manifest.model!r}")
    folder = forest_dir / manifest.model
    if folder.is_symlink() or not (folder / "config.json").is_file():
        raise ForestError(f"{folder} is missing (or a link), but {_FILE} names it; restore it from a copy")


def _field(value: object, name: str) -> object:
    return value.get(name) if isinstance(value, dict) else None
