"""The whole configuration, typed and checked before anything runs.

Hydra composes YAML and command-line overrides (``btm/cli.py``); :func:`parse_config` turns the result into these
frozen models. Unknown keys, wrong types and bad values are all reported together. Below the command line only these
models are used. The text under each field is its documentation: first words are unit and range.
"""

from enum import StrEnum
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field


class Model(BaseModel):
    """A frozen record that refuses unknown keys and documents fields by the string below them."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, protected_namespaces=(), allow_inf_nan=False
    )


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


class ModelConfig(Model):
    """Architecture of a model trained from scratch, or the pretrained directory to start from."""

    path: str | None = None
    """Hugging Face causal LM directory that becomes the seed (its weights are taken); null trains from scratch."""
    arch: str = "llama"
    """Any ``model_type`` of transformers' causal LMs whose config takes the sizes below."""
    num_layers: int = Field(default=4, ge=1)
    """Transformer blocks."""
    hidden_size: int | None = Field(default=None, ge=8)
    """Width; null is 64 per layer."""
    num_heads: int | None = Field(default=None, ge=1)
    """Attention heads; null is one per 64 of width."""
    num_kv_heads: int | None = Field(default=None, ge=1)
    """Key and value heads (grouped-query attention); null is ``num_heads``."""
    intermediate_size: int | None = Field(default=None, ge=8)
    """Feed-forward width; null is 8/3 of the width rounded up to a multiple of 32."""
    max_positions: int = Field(default=2048, ge=16)
    """Longest sequence of positions."""
    tie_embeddings: bool = True
    """Share the input and output embedding."""
    extra: dict[str, Any] = {}
    """Further keys of the transformers config, taken as they are."""


class Schedule(StrEnum):
    """Learning-rate decay after the warm-up."""

    cosine = "cosine"
    linear = "linear"
    wsd = "wsd"
    constant = "constant"


class Packing(StrEnum):
    """How documents fill sequences."""

    blocks = "blocks"
    documents = "documents"


class TrainConfig(Model):
    """Recipe shared by every model of a run."""

    tokens: int = Field(default=3_276_800, ge=1)
    """Tokens of the whole budget: seed phase plus all ELMs together; the dense baseline gets the same."""
    seed_fraction: float = Field(default=0.5, ge=0, le=1)
    """Share of the updates that the seed phase takes (Branch-Train-Merge, https://arxiv.org/abs/2208.03306)."""
    batch_tokens: int = Field(default=8192, ge=1)
    """Tokens per update of the seed and dense models; an ELM gets an equal share of it."""
    sequence_length: int = Field(default=256, ge=8)
    """Tokens per sequence."""
    micro_batch_sequences: int | None = Field(default=None, ge=1)
    """Sequences per forward pass; the rest of a batch is accumulated; null runs the batch in one pass."""
    packing: Packing = Packing.blocks
    """blocks: contiguous tokens across documents; documents: no attention across document borders."""
    lr: float = Field(default=2e-3, gt=0)
    """Peak learning rate."""
    min_lr_fraction: float = Field(default=0.1, ge=0, le=1)
    """Last learning rate as a share of the peak."""
    schedule: Schedule = Schedule.cosine
    """Shape of the decay; wsd holds the peak and decays linearly at the end."""
    warmup_fraction: float = Field(default=0.05, ge=0, le=1)
    """Share of all updates with a linearly rising learning rate."""
    decay_fraction: float = Field(default=0.2, gt=0, le=1)
    """Share of all updates that the final decay of wsd takes."""
    beta1: float = Field(default=0.9, ge=0, lt=1)
    """Adam's first decay."""
    beta2: float = Field(default=0.95, ge=0, lt=1)
    """Adam's second decay."""
    eps: float = Field(default=1e-8, gt=0)
    """Adam's epsilon."""
    weight_decay: float = Field(default=0.1, ge=0)
    """Decoupled weight decay of matrices; norms and biases have none."""
    clip_norm: float = Field(default=1.0, gt=0)
    """Largest global gradient norm."""
    checkpoint_every: int = Field(default=100, ge=1)
    """Updates between checkpoints."""
    keep_checkpoints: int = Field(default=2, ge=2)
    """Newest checkpoints kept."""
    eval_every: int = Field(default=100, ge=1)
    """Updates between evaluations on dev."""
    eval_tokens: int = Field(default=16_384, ge=1)
    """Dev tokens per evaluation and domain."""
    log_every: int = Field(default=10, ge=1)
    """Updates between metric rows."""
    max_bad_steps: int = Field(default=10, ge=0)
    """Consecutive skipped updates (NaN, Inf or loss spike) after which training stops."""
    spike_factor: float = Field(default=3.0, gt=1)
    """A loss above this many times its running mean is a spike; the update is skipped."""


class BranchSource(StrEnum):
    """Weights that a new ELM starts from."""

    seed = "seed"
    nearest = "nearest"
    uniform = "uniform"
    posterior = "posterior"


class BranchOptimizer(StrEnum):
    """Optimizer state that a new ELM starts with."""

    keep = "continue"
    reset = "reset"


class BranchConfig(Model):
    """Where a new ELM comes from (Branch-Train-Merge, section 3)."""

    source: BranchSource = Field(default=BranchSource.seed, alias="from")
    """seed; nearest ELM; uniform mean of the ELMs; or their mean weighted by the domain posterior."""
    optimizer: BranchOptimizer = BranchOptimizer.keep
    """continue the parent's optimizer state (seed only) or reset it."""
    sample_documents: int = Field(default=100, ge=1)
    """Dev documents of the new domain on which the posterior is estimated."""


class BaselineConfig(Model):
    """Compute-matched models trained beside the forest for comparison."""

    dense: bool = False
    """One model that continues the seed on all domains for the whole budget."""
    random_split: bool = False
    """A forest of as many ELMs on random splits of the same documents."""


class Dtype(StrEnum):
    """Arithmetic of forward and backward; master weights and optimizer state are always fp32."""

    bf16 = "bf16"
    fp32 = "fp32"


class EngineConfig(Model):
    """What runs forward, backward and the optimizer step of one model."""

    name: Literal["torch"] = "torch"
    """Engine."""
    dtype: Dtype = Dtype.bf16
    """Arithmetic of forward and backward."""
    num_processes: int = Field(default=1, ge=1)
    """Data-parallel processes per model."""
    deterministic: bool = True
    """Only algorithms that give the same bits every time."""


class MergeMethodName(StrEnum):
    """Ways to average weights."""

    uniform = "uniform"
    weighted = "weighted"
    posterior = "posterior"
    nearest = "nearest"
    greedy_soup = "greedy_soup"


class MergeConfig(Model):
    """How ``btm merge`` combines the ELMs of a forest into one model."""

    method: MergeMethodName = MergeMethodName.uniform
    """Name in the table of methods."""
    weights: dict[str, float] = {}
    """Weights per ELM for ``weighted``; normalised to 1."""
    domain: str | None = None
    """Target domain whose dev documents give the weights of ``posterior`` and judge ``greedy_soup``."""
    elms: list[str] = []
    """ELMs to take; empty takes all."""
    output: str | None = None
    """Directory to write; null is ``<forest>/merged/<method>``."""
    memory_bytes: int = Field(default=64 << 20, ge=1 << 20)
    """Private memory that streaming may take."""


class PosteriorMode(StrEnum):
    """What the mixture weights of the ELMs look at."""

    history = "history"
    last_token = "last_token"
    fixed = "fixed"


class Prior(StrEnum):
    """Prior over ELMs."""

    uniform = "uniform"
    updating = "updating"
    cached = "cached"


class PriorEstimator(StrEnum):
    """How a cached prior is estimated on dev documents."""

    mean = "mean"
    ema = "ema"
    em = "em"


class EnsembleConfig(Model):
    """How the next-token distributions of the ELMs are mixed."""

    posterior: PosteriorMode = PosteriorMode.history
    """history: prior x likelihood of the whole context; last_token: the published scorers; fixed: the prior alone."""
    prior: Prior = Prior.uniform
    """uniform, updating over the test documents, or cached from dev documents of the target domain."""
    estimator: PriorEstimator = PriorEstimator.mean
    """Estimator of the cached prior; ema is what the papers do."""
    temper: float = Field(default=1.0, ge=0, le=1)
    """Exponent of the likelihood: posterior = prior x likelihood^temper."""
    top_k: int | None = Field(default=None, ge=1)
    """ELMs kept, by weight, and renormalised; null keeps all."""
    prior_documents: int = Field(default=100, ge=1)
    """Dev documents that a cached prior is estimated on."""


class EvaluateConfig(Model):
    """What is measured on held-out documents."""

    max_tokens: int = Field(default=65_536, ge=256)
    """Test tokens per domain (whole documents)."""
    sequence_length: int | None = Field(default=None, ge=8)
    """Context window in tokens; null is ``train.sequence_length``."""
    bootstrap_samples: int = Field(default=1000, ge=10)
    """Resamplings of documents for the confidence intervals."""
    batch_sequences: int = Field(default=16, ge=1)
    """Windows per forward pass."""


class ExecutorName(StrEnum):
    """Where tasks run."""

    local = "local"
    ray = "ray"


class LaunchConfig(Model):
    """Who runs the tasks of a plan."""

    executor: ExecutorName = ExecutorName.local
    """local subprocesses or Ray."""
    cpus_per_elm: int = Field(default=1, ge=1)
    """Cores of one ELM's group."""
    gpus_per_elm: int = Field(default=0, ge=0)
    """GPUs of one ELM's group."""
    num_groups: int | None = Field(default=None, ge=1)
    """ELMs that train at the same time; null is as many as the machine or cluster holds."""
    max_restarts: int = Field(default=2, ge=0)
    """Restarts of a task that died."""
    ray_address: str | None = None
    """Address of an existing Ray cluster; null starts a private one on this machine."""
    ray_dashboard: bool = False
    """Serve Ray's dashboard on loopback."""
    poll_interval_s: float = Field(default=0.2, gt=0, le=60)
    """Seconds between two looks at the running tasks."""


class TrackerName(StrEnum):
    """Where metrics are mirrored; JSON lines are always written."""

    none = "none"
    wandb = "wandb"


class TrackingConfig(Model):
    """Experiment tracking beside the JSON-lines metrics."""

    name: TrackerName = TrackerName.none
    """Mirror."""
    mode: Literal["online", "offline"] = "offline"
    """W&B mode; keys come from the environment only."""
    project: str = "btm"
    """W&B project."""
    entity: str | None = None
    """W&B entity."""


class GenerateConfig(Model):
    """How ``btm generate`` continues a prompt."""

    prompt: str = ""
    """Text to continue."""
    model: str = "ensemble"
    """``ensemble``, ``seed``, ``elm/<domain>`` or a model directory."""
    max_new_tokens: int = Field(default=64, ge=1)
    """Tokens to add."""
    temperature: float = Field(default=0.0, ge=0)
    """0 takes the most likely token; above, samples."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Probability mass that sampling keeps."""


class Config(Model):
    """One run: a forest and everything that trains, merges and evaluates it."""

    name: str = "forest"
    """Name of the run."""
    forest: str = "outputs/${name}"
    """Forest directory."""
    seed: int = Field(default=0, ge=0, lt=2**31)
    """Root of every random choice."""
    dry_run: bool = False
    """Print the plan and stop."""
    allow_config_change: bool = False
    """Go on in a forest that was begun with another configuration."""
    domain: str | None = None
    """Domain that ``add``, ``remove`` and ``inspect`` speak of."""
    output_json: bool = Field(default=False, alias="json")
    """Print JSON instead of tables."""
    data: DataConfig = DataConfig()
    tokenizer: TokenizerConfig = TokenizerConfig()
    model: ModelConfig = ModelConfig()
    train: TrainConfig = TrainConfig()
    branch: BranchConfig = BranchConfig()
    baselines: BaselineConfig = BaselineConfig()
    engine: EngineConfig = EngineConfig()
    merge: MergeConfig = MergeConfig()
    ensemble: EnsembleConfig = EnsembleConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    generate: GenerateConfig = GenerateConfig()
    launch: LaunchConfig = LaunchConfig()
    tracking: TrackingConfig = TrackingConfig()
