"""Keys ``ensemble.*``, ``evaluate.*`` and ``generate.*``: how finished models read, are measured and write."""

from enum import StrEnum

from pydantic import Field

from btm.schema import Model


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


class GenerateConfig(Model):
    """How ``btm generate`` continues a prompt."""

    prompt: str = ""
    """Text to continue; in a forest with pictures ``<image>`` at its end asks for one."""
    image: str | None = None
    """Picture that stands before the prompt, in a forest with pictures."""
    image_directory: str | None = None
    """Where pictures of the answer are written as PNG files; null is ``<forest>/generated``."""
    model: str = "ensemble"
    """``ensemble``, ``seed``, ``elm/<domain>`` or a model directory; after training with ``ffn``: ``sparse``, ``sparse/<domain>`` (DEMix) or ``dense``."""
    max_new_tokens: int = Field(default=64, ge=1)
    """Tokens to add."""
    temperature: float = Field(default=0.0, ge=0)
    """0 takes the most likely token; above, samples."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Probability mass that sampling keeps."""
