"""What a forest holds, as JSON files: prepared domains, results of workers, the manifest, the evaluation.

Each result carries ``spec_sha256``, the hash of the request (``btm/requests.py``) that it answers.
"""

from pathlib import Path
from typing import Any, Literal, Self

from pydantic import SerializerFunctionWrapHandler, ValidationError, model_serializer

from btm.errors import ForestError
from btm.files import read_json, sha256_of_json, write_json
from btm.schema import Model

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
)
"""Files that a tokenizer may have."""
PICTURES_FILE = "pictures.npy"
"""In the directory of a prepared domain with pictures: which document shows which."""


TRAINING_ROUTING = "sparse/training_routing"
"""Row of an evaluation: the sparse model with the routing that it has in training, over the whole batch."""


class StoredModel(Model):
    """A record that is stored as one JSON file."""

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read and check the record.

        Raises:
            ForestError: If the file is missing, is not JSON, or does not have this form.
        """
        try:
            return cls.model_validate(read_json(path))
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            raise ForestError(f"{path} is not a valid {cls.__name__}: {where}: {first['msg']}") from None

    def save(self, path: Path) -> None:
        """Write the record atomically."""
        write_json(path, self.model_dump(mode="json", by_alias=True))

    @property
    def sha256(self) -> str:
        """Hash of the content, independent of key order."""
        return sha256_of_json(self.model_dump(mode="json", by_alias=True))


class Ledger(Model):
    """What a model cost. ``seconds`` is wall-clock of training alone."""

    tokens: int = 0
    flops: float = 0.0
    seconds: float = 0.0

    def __add__(self, other: "Ledger") -> "Ledger":
        return Ledger(
            tokens=self.tokens + other.tokens, flops=self.flops + other.flops, seconds=self.seconds + other.seconds
        )


class SplitInfo(Model):
    """Size of one split of a domain."""

    documents: int
    tokens: int
    bytes: int


class DomainInfo(StoredModel):
    """A prepared domain: ``corpus/<domain>/corpus.json`` beside ``<split>.bin``, ``.idx`` and ``.bytes.npy``."""

    domain: str
    fingerprint: str
    """SHA-256 over splits, tokens and the settings that shaped them."""
    tokenizer_sha256: str
    sources: list[str]
    splits: dict[Literal["train", "dev", "test"], SplitInfo]
    exact_duplicates: int = 0
    near_duplicates: int = 0
    broken: dict[str, int] = {}
    """Kind of fault -> documents skipped."""


class TrainResult(StoredModel):
    """What a training task did."""

    name: str
    spec_sha256: str
    model_dir: str
    ledger: Ledger
    updates: int
    skipped_updates: int
    final_loss: float
    dev_loss: dict[str, float] = {}
    """Domain -> nats per token."""
    realised_tokens: dict[str, int] = {}
    """Domain -> training tokens drawn from it."""
    num_parameters: int


class StepResult(StoredModel):
    """``result.json`` of a step that leaves nothing else to record."""

    spec_sha256: str
    seconds: float = 0.0


class PrepareResult(StoredModel):
    """``result.json`` of a preparation."""

    spec_sha256: str
    tokenizer_sha256: str
    vocab_size: int
    domains: dict[str, DomainInfo]
    warnings: list[str] = []


class MergeResult(StoredModel):
    """What went into an average."""

    spec_sha256: str
    weights: dict[str, float]
    files: dict[str, str]
    seconds: float


class Parent(Model):
    """An ancestor of an ELM and its weight in the branch."""

    name: str
    """``seed`` or the name of an ELM."""
    weight: float


class ElmRecord(Model):
    """One ELM of a forest."""

    domain: str
    directory: str
    """Relative to the forest."""
    parents: list[Parent]
    ancestors: list[str] = []
    """Every ELM whose weights went, directly or not, into the branch."""
    ledger: Ledger
    """What this forest spent on it: nothing for an imported model, whose own cost nobody recorded."""
    data_fingerprint: str
    files: dict[str, str]
    """File name -> SHA-256."""
    checksums: dict[str, str] = {}
    """File name -> XXH3-128, for fast checks against damage; empty in older records."""
    num_parameters: int
    dev_loss: dict[str, float] = {}
    origin: Literal["trained", "imported"] = "trained"
    created: str
    """UTC time, ISO 8601."""


class ForestManifest(StoredModel):
    """``forest.json``: the state of a forest."""

    schema_version: int = 1
    name: str
    tokenizer_sha256: str
    vocab_size: int
    seed: ElmRecord | None = None
    elms: list[ElmRecord] = []


class ModalityScore(Model):
    """One model on the tokens of one modality in one domain's test documents."""

    perplexity: float
    low: float
    """2.5 % bootstrap quantile over documents."""
    high: float
    """97.5 % bootstrap quantile over documents."""
    tokens: int


class DomainScore(Model):
    """One model on one domain's test documents."""

    perplexity: float
    low: float
    """2.5 % bootstrap quantile over documents."""
    high: float
    """97.5 % bootstrap quantile over documents."""
    bits_per_byte: float
    tokens: int
    modalities: dict[str, ModalityScore] = {}
    """``text`` and ``image`` -> score of the tokens of that kind; empty, and not stored, for domains of text alone."""

    @model_serializer(mode="wrap")
    def _without_nothing(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        stored = serialize(self)
        if not self.modalities:
            stored.pop("modalities", None)
        return stored


class ModelScores(Model):
    """One row of the evaluation."""

    ledger: Ledger | None = None
    domains: dict[str, DomainScore]
    note: str = ""


class PosteriorTrace(Model):
    """Posterior over ELMs while one test document is read."""

    domain: str
    elms: list[str]
    tokens: list[str]
    weights: list[list[float]]
    """One row per token, one column per ELM."""


class Evaluation(StoredModel):
    """``evaluation.json``: everything that tables and report show."""

    domains: list[str]
    novel_domains: list[str]
    models: dict[str, ModelScores]
    """``seed``, ``dense``, ``elm/<domain>``, ``average/<method>``, ``ensemble/<prior>``, ``random_split/ensemble``."""
    traces: list[PosteriorTrace] = []
    cached_priors: dict[str, dict[str, float]] = {}
    """Target domain -> ELM -> weight."""
    sequence_length: int
