"""What workers are asked to do, as JSON files; a result carries the hash of its request.

A finished step is recognised by that ``spec_sha256``, and a changed one is never mistaken for it.
"""

from typing import Any, Literal, Self

from pydantic import Field

from btm.config_data import DataConfig, TokenizerConfig
from btm.config_ensemble import EnsembleConfig, EvaluateConfig
from btm.config_ffn import FfnConfig
from btm.config_merge import MergeMethodName
from btm.config_model import EngineConfig, ModelConfig
from btm.config_train import TrainConfig
from btm.files import sha256_of_json
from btm.records import Ledger, StoredModel
from btm.schema import Model


class SpecModel(StoredModel):
    """A request for a worker; its hash does not depend on where the forest lies, so that a forest can be moved."""

    root: str = ""
    """Directory of the forest."""

    @property
    def sha256(self) -> str:
        """Hash of the content with paths relative to ``root``."""
        return sha256_of_json(self.portable())

    def portable(self) -> dict[str, Any]:
        """The content without ``root``; a path in it begins with ``<forest>`` instead."""
        return _relative(self.model_dump(mode="json", by_alias=True, exclude={"root"}), self.root)

    @classmethod
    def placed(cls, content: dict[str, Any], root: str) -> Self:
        """The request whose :meth:`portable` content this is, in the directory ``root``."""
        return cls.model_validate({**_relative(content, "<forest>", root), "root": root})


def _relative(value: Any, root: str, name: str = "<forest>") -> Any:
    if isinstance(value, str) and root and value.startswith(root):
        return name + value.removeprefix(root)
    if isinstance(value, dict):
        return {key: _relative(item, root, name) for key, item in value.items()}
    if isinstance(value, list):
        return [_relative(item, root, name) for item in value]
    return value


class Part(Model):
    """One of ``count`` random parts of the documents (the random-split baseline)."""

    index: int = Field(ge=0)
    count: int = Field(ge=1)


class TokenSource(Model):
    """Token shards to train or evaluate on."""

    domain: str
    prefix: str
    """Path of the shard without ``.bin`` / ``.idx``."""
    weight: float = Field(default=1.0, ge=0)
    part: Part | None = None
    fingerprint: str = ""
    """Of the prepared domain, so that a changed corpus is noticed."""


class Start(Model):
    """Where the weights of a training run come from."""

    kind: Literal["scratch", "weights", "checkpoint", "upcycle"]
    """scratch: random from the model config; weights: a Hugging Face directory with a fresh optimizer; checkpoint: a run directory of the trainer whose newest checkpoint is continued, optimizer included; upcycle: a sparse model with one expert per modality, whose experts are copied."""
    path: str | None = None
    sha256: str = ""
    """Of what made the parent, so that a changed parent is noticed."""


class TrainSpec(SpecModel):
    """One training task: updates ``first_update`` (exclusive) to ``last_update`` of a schedule of ``total_updates``."""

    name: str
    output_dir: str
    """Receives ``metrics.jsonl``, ``checkpoints/``, ``model/`` (a Hugging Face directory) and ``result.json``."""
    start: Start
    sources: list[TokenSource]
    dev: list[TokenSource] = []
    first_update: int = Field(default=0, ge=0)
    last_update: int = Field(ge=0)
    total_updates: int = Field(ge=1)
    batch_sequences: int = Field(ge=1)
    """Sequences per update over all processes."""
    first_batch: int = Field(default=0, ge=0)
    """Updates whose documents were read by the seed of an upcycled model."""
    tokenizer_dir: str
    model: ModelConfig
    ffn: FfnConfig = FfnConfig()
    """Expert layers that a dense start gets; a start that has some keeps them and takes the weights of losses only."""
    trainable_domain: str | None = None
    """Train the experts of this domain alone, all else frozen (DEMix); null trains everything."""
    trains_auxiliary_only: bool = False
    """Train the auxiliary routers of modality-aware layers alone, all else frozen."""
    train: TrainConfig
    engine: EngineConfig
    seed: int = 0


class ScoreSource(Model):
    """One split of one domain to score."""

    key: str
    """``test-<domain>`` or ``dev-<domain>``; the output file is ``<key>.npz``."""
    prefix: str
    """Path of the shard without ``.bin`` / ``.idx``."""
    fingerprint: str
    """Of the domain, so that stale scores are recognised."""
    max_tokens: int | None = None
    """Stop after the document that passes this many tokens; null scores all."""
    max_documents: int | None = None


class ScoreSpec(SpecModel):
    """Ask for the log-probability of every token of some splits under one model.

    Each ``<key>.npz`` holds ``logp`` (float32, nats, all scored documents one after the other), ``document_starts``
    (int64, documents + 1) and ``document_bytes`` (int64).
    """

    name: str
    model_dir: str
    model_sha256: str
    """Of the weights, so that stale scores are recognised."""
    routing: Literal["causal", "training"] = "causal"
    """training: experts choose over the whole pass, as they do in training (modality-aware layers)."""
    pass_tokens: int | None = None
    """Tokens of a forward pass with that routing: those of one in training."""
    expert: str | None = None
    """Score the dense model of this domain (DEMix)."""
    sources: list[ScoreSource]
    output_dir: str
    sequence_length: int
    batch_sequences: int
    dtype: Literal["bf16", "fp32"] = "bf16"


class PrepareSpec(SpecModel):
    """Turn text into token shards: ``<output_dir>/<domain>/{train,dev,test}.{bin,idx}``."""

    output_dir: str
    """The forest's ``corpus`` directory."""
    tokenizer_dir: str
    """The forest's tokenizer: used when it exists, written when it does not."""
    pretrained_dir: str | None = None
    """Tokenizer directory to copy when the forest has none; null trains one."""
    data: DataConfig
    tokenizer: TokenizerConfig
    seed: int = 0


class MergeInput(Model):
    """One model that goes into an average."""

    name: str
    directory: str
    files: dict[str, str] = {}
    """File name -> SHA-256, when known (an ELM's record)."""
    checksums: dict[str, str] = {}
    """File name -> XXH3-128; compared instead of SHA-256 where given, which takes a tenth of the time."""
    score_dir: str | None = None
    """Scores on ``dev-<domain>``; needed by ``posterior``."""


class MergeSpec(SpecModel):
    """Average some models of one architecture into a Hugging Face directory."""

    name: str
    method: MergeMethodName
    models: list[MergeInput]
    """In manifest order; sums are accumulated in this order."""
    weights: dict[str, float] = {}
    """Name -> weight, for ``weighted``."""
    domain: str | None = None
    """Target domain of ``posterior`` and ``greedy_soup``."""
    dev: ScoreSource | None = None
    """Dev split that judges ``greedy_soup``."""
    sequence_length: int = Field(default=512, ge=8)
    """Context window in which ``greedy_soup`` judges."""
    batch_sequences: int = Field(default=16, ge=1)
    tokenizer_dir: str
    output_dir: str
    """The model directory; ``result.json`` is written beside it as ``<output_dir>.json``."""
    memory_bytes: int = 64 << 20


class EvaluateSpec(SpecModel):
    """Turn scores into perplexities, ensembles, intervals and posteriors."""

    domains: list[str]
    novel_domains: list[str]
    models: dict[str, str]
    """Row name -> score directory with ``test-<domain>.npz`` (``seed``, ``dense``, ``elm/<domain>``, ``average/uniform``)."""
    per_domain_models: dict[str, dict[str, str]] = {}
    """Row name -> domain -> score directory, for rows whose model differs by domain (``average/posterior``)."""
    elms: dict[str, str]
    """ELM -> score directory with ``test-`` and ``dev-`` files, in manifest order: the ensemble's members."""
    random_split: list[str] = []
    """Score directories of the random-split forest."""
    score_results: dict[str, str] = {}
    """Score directory -> hash of the request that its scores answer, so that new scores are noticed."""
    ledgers: dict[str, Ledger] = {}
    notes: dict[str, str] = {}
    """Row name -> what a reader must know of it."""
    test_prefixes: dict[str, str] = {}
    """Domain -> test shard, for the posterior traces and the modality of each token."""
    pictured: list[str] = []
    """Domains with pictures: their scores are also given by modality."""
    tokenizer_dir: str
    ensemble: EnsembleConfig
    evaluate: EvaluateConfig
    sequence_length: int
    seed: int = 0
    output: str
    """``evaluation.json``."""
