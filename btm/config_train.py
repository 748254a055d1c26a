"""Keys ``train.*``, ``branch.*`` and ``baselines.*``: the recipe and which models are trained by it."""

from enum import StrEnum

from pydantic import Field

from btm.schema import Model


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


class Optimizer(StrEnum):
    """Who turns gradients into updates."""

    adamw = "adamw"
    adamw_8bit = "adamw_8bit"


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
    activation_checkpointing: bool = False
    """Keep only the input of each block and run the block again in the backward pass: less memory for one more forward pass of the blocks, the same bits."""
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
    optimizer: Optimizer = Optimizer.adamw
    """AdamW (https://arxiv.org/abs/1711.05101) with moments in fp32; adamw_8bit is refused, with what takes its place."""
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


def optimizer_problems(train: TrainConfig) -> list[str]:
    """What is wrong with ``train.optimizer``, worded for the user."""
    if train.optimizer is Optimizer.adamw:
        return []
    return [
        f"train.optimizer={train.optimizer} is not supported: in a trial with the kernels of bitsandbytes, weights with "
        f"small gradients leapt; use train.optimizer=adamw, and for its memory engine=deepspeed with "
        f"engine.zero_stage=1 on several devices, or with engine.offload=optimizer on one"
    ]


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
