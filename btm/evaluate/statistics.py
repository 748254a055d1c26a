"""Perplexity, bits per byte and their bootstrap intervals from the log-probabilities of documents."""

import math
from collections.abc import Mapping

import numpy as np

from btm.errors import DataError
from btm.records import DomainScore, ModalityScore

_MAX_NATS = 700.0
"""A mean loss above this would overflow; perplexity is cut there."""


def domain_score(
    logp: np.ndarray,
    starts: np.ndarray,
    num_bytes: np.ndarray,
    *,
    samples: int,
    seed: int,
    modalities: Mapping[str, np.ndarray] | None = None,
) -> DomainScore:
    """Summarise one model on one domain.

    The interval comes from resampling whole documents with replacement (percentile bootstrap), because tokens of one
    document depend on each other. The resamples depend on ``seed`` and the number of documents alone, so that models
    compared on one domain see the same ones.

    Args:
        logp: Log-probability of each token in nats, ``(tokens,)``.
        starts: First token of each document and the end of the last, ``(documents + 1,)``.
        num_bytes: UTF-8 bytes of each document, ``(documents,)``.
        samples: Resamples.
        seed: Root of the resamples.
        modalities: Name of a modality -> which tokens are of it, bool ``(tokens,)``; None for text alone.

    Returns:
        Perplexity per token with its 95 % interval, and bits per byte; the same perplexity of each modality that has
        tokens.

    Raises:
        DataError: If there are no tokens.
    """
    if not len(logp):
        raise DataError("perplexity needs at least one token, got none; give the domain more text or a larger split")
    tokens = np.diff(starts)
    first = starts[:-1][tokens > 0]
    nats = -np.add.reduceat(logp.astype(np.float64), first)
    num_bytes, tokens = num_bytes[tokens > 0], tokens[tokens > 0]
    counts = resample_counts(len(tokens), samples=samples, seed=seed)
    by_modality = {
        name: _modality_score(logp, is_own, first, counts)
        for name, is_own in (modalities or {}).items()
        if is_own.any()
    }
    means = (counts @ nats) / (counts @ tokens)
    low, high = np.quantile(means, [0.025, 0.975])
    return DomainScore(
        perplexity=_perplexity(nats.sum() / tokens.sum()),
        low=_perplexity(low),
        high=_perplexity(high),
        bits_per_byte=float(nats.sum() / math.log(2) / max(1, num_bytes.sum())),
        tokens=int(tokens.sum()),
        modalities=by_modality,
    )


def _modality_score(logp: np.ndarray, is_own: np.ndarray, first: np.ndarray, counts: np.ndarray) -> ModalityScore:
    """The tokens of one modality; ``first`` are the starts of the documents, ``counts`` their resamples."""
    nats = -np.add.reduceat(np.where(is_own, logp, 0).astype(np.float64), first)
    tokens = np.add.reduceat(is_own.astype(np.int64), first)
    drawn = counts @ tokens
    # Few documents with this modality may miss all of a resample.
    means = (counts @ nats)[drawn > 0] / drawn[drawn > 0]
    low, high = np.quantile(means, [0.025, 0.975])
    return ModalityScore(
        perplexity=_perplexity(nats.sum() / tokens.sum()),
        low=_perplexity(low),
        high=_perplexity(high),
        tokens=int(tokens.sum()),
    )


def resample_counts(num_documents: int, *, samples: int, seed: int) -> np.ndarray:
    """How often each document is drawn in each resample: float64 ``(samples, documents)``, rows sum to documents."""
    generator = np.random.default_rng([seed, num_documents])
    return generator.multinomial(num_documents, np.full(num_documents, 1 / num_documents), size=samples).astype(float)


def _perplexity(nats: float) -> float:
    return math.exp(min(float(nats), _MAX_NATS))
