"""Keys ``data.*`` and ``tokenizer.*``: which text is read and how it becomes tokens."""

from enum import StrEnum

from pydantic import Field

from btm.schema import Model


class OnError(StrEnum):
    """What to do with broken documents."""

    stop = "stop"
    skip = "skip"


class DataConfig(Model):
    """Where the text of each domain is, and how documents become splits."""

    domains: dict[str, str | list[str]] = {}
    """Domain name -> path, glob or list of them: JSON lines (.jsonl, .json; .gz, .zst), .txt, .parquet, a directory of such files, or a Hugging Face dataset on disk."""
    novel: dict[str, str | list[str]] = {}
    """Domains that are evaluated but trained on by nobody; same forms as ``domains``."""
    add_later: dict[str, str | list[str]] = {}
    """Domains that join the forest by ``btm add`` after the first round of the same run."""
    directory: str | None = None
    """Directory whose files and folders each become a domain named after them."""
    novel_directory: str | None = None
    """The same for ``novel``."""
    path: str | list[str] | None = None
    """Text of the new domain of ``btm add domain=...``."""
    local_text: bool = False
    """Take the domains from the text that every Python installation holds (the demo's corpus)."""
    text_field: str = "text"
    """Field that holds the text in JSON lines, parquet and dataset rows."""
    on_error: OnError = OnError.stop
    """stop at the first broken document, or skip it and report counts."""
    dev_fraction: float = Field(default=0.05, gt=0, lt=0.5)
    """Share of documents (by hash) held out for development."""
    test_fraction: float = Field(default=0.05, gt=0, lt=0.5)
    """Share of documents (by hash) held out for the final evaluation."""
    images: list[str] = []
    """Domains (of any group) whose documents hold pictures: JSON lines of {"image": path, "captions": ...} or {"text": "... <image> ...", "images": [paths]}."""
    caption_keys: list[str] = []
    """Keys of nested captions to keep, for example [en]; an object without any of them keeps all."""
    near_duplicate_threshold: float = Field(default=0.8, gt=0, le=1)
    """Jaccard similarity of word 5-gram shingles above which a dev or test document counts as a copy of a training document and is dropped; 1 checks exact copies only."""
    min_train_tokens: int = Field(default=20_000, ge=1)
    """Tokens that the training split of a domain must have."""
    max_documents: int | None = Field(default=None, ge=1)
    """Documents read per domain; null reads all."""
    num_workers: int = Field(default=0, ge=0)
    """Tokeniser processes; 0 takes one per core of this machine."""
    weights: dict[str, float] = {}
    """Mixture weights of the seed and dense models over domains; equal where missing."""
    seed_data_fraction: float = Field(default=0.0, ge=0, lt=1)
    """Share of each ELM's batches drawn from the seed mixture instead of its own domain."""


class TokenizerConfig(Model):
    """The one tokenizer that every model of a forest shares."""

    path: str | None = None
    """Hugging Face tokenizer directory; null trains one, or takes the pretrained model's."""
    vocab_size: int = Field(default=4096, ge=260, le=1_000_000)
    """Entries of a trained byte-level BPE tokenizer."""
    train_bytes: int = Field(default=20_000_000, ge=10_000)
    """Bytes of text, shared equally by the domains, that a trained tokenizer sees."""
    image_size: int = Field(default=32, ge=4, le=1024)
    """Side in pixels of the squares that pictures are fitted into; a multiple of ``image_patch``."""
    image_patch: int = Field(default=4, ge=1, le=64)
    """Side in pixels of the patch that becomes one token."""
    image_codes: int = Field(default=1024, ge=2, le=65_536)
    """Entries of the image tokenizer's codebook, which follow the text's entries in the one vocabulary."""
    image_train_pictures: int = Field(default=20_000, ge=1)
    """Pictures, shared equally by the domains, that the image tokenizer is trained on."""
