"""Rows of the evaluation that mix ELMs, computed from their scores alone: no model is loaded."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from btm.config_ensemble import EnsembleConfig, PosteriorMode
from btm.ensemble.posterior import UpdatingPrior, estimate_prior, keep_top_k, log_uniform_prior, log_weights, mixture
from btm.errors import EnsembleError
from btm.evaluate.score import Scores


@dataclass(frozen=True, slots=True)
class ElmScores:
    """Scores of all ELMs on the same documents.

    Attributes:
        logp: ``(E, tokens)``, float32.
        document_starts: ``(documents + 1,)``.
        document_bytes: ``(documents,)``.
    """

    logp: Tensor
    document_starts: np.ndarray
    document_bytes: np.ndarray

    @classmethod
    def of(cls, scores: dict[str, Scores]) -> "ElmScores":
        """Stack the scores of several models, given by name.

        Raises:
            EnsembleError: If they were not taken on the same documents.
        """
        first_name, first = next(iter(scores.items()))
        for name, other in scores.items():
            check_same_documents(first_name, first.document_starts, name, other.document_starts)
        logp = torch.stack([torch.from_numpy(one.logp) for one in scores.values()])
        return cls(logp, first.document_starts, first.document_bytes)

    def documents(self, count: int | None = None) -> Iterator[Tensor]:
        """Log-probabilities ``(E, T)`` of each of the first ``count`` documents."""
        for start, stop in list(zip(self.document_starts[:-1], self.document_starts[1:], strict=True))[:count]:
            yield self.logp[:, start:stop]


def check_same_documents(first: str, first_starts: np.ndarray, name: str, starts: np.ndarray) -> None:
    """Make sure that two models were scored on the same documents, given by where they start.

    Raises:
        EnsembleError: If they were not.
    """
    if not np.array_equal(first_starts, starts):
        raise EnsembleError(
            f"{first!r} and {name!r} were scored on different documents ({len(first_starts) - 1} documents with "
            f"{first_starts[-1]} tokens against {len(starts) - 1} with {starts[-1]}); "
            "run `btm evaluate` again with one configuration"
        )


def cached_prior(dev: ElmScores, config: EnsembleConfig) -> Tensor:
    """Prior over ELMs, estimated on the first ``config.prior_documents`` dev documents: ``(E,)``, sums to 1."""
    documents = list(dev.documents(config.prior_documents))
    return estimate_prior(documents, config.estimator, temper=config.temper, mode=config.posterior)


def mixture_rows(test: ElmScores, prior: Tensor | None, config: EnsembleConfig) -> dict[str, np.ndarray]:
    """Log-probability of every test token under each kind of ensemble, by row name.

    ``ensemble/uniform``, ``ensemble/updating`` and ``ensemble/cached`` weigh by ``config.posterior``;
    ``ensemble/fixed`` is the cached prior alone; ``ensemble/last_token`` the published scorers with a uniform prior.
    With ``config.top_k`` below the number of ELMs there are also ``ensemble/<prior>/top-<k>``: the ELMs of largest
    posterior at each token (uniform), or of largest prior (cached), renormalised.
    """
    num_elms = test.logp.shape[0]
    uniform, mode, temper = log_uniform_prior(num_elms), config.posterior, config.temper
    rows = {
        "ensemble/uniform": mix(test, uniform, mode=mode, temper=temper),
        "ensemble/updating": mix_updating(test, mode=mode, temper=temper),
        "ensemble/last_token": mix(test, uniform, mode=PosteriorMode.last_token),
    }
    top_k = config.top_k if config.top_k is not None and config.top_k < num_elms else None
    if top_k:
        rows[f"ensemble/uniform/top-{top_k}"] = mix(test, uniform, mode=mode, temper=temper, top_k=top_k)
    if prior is None:
        return rows
    rows["ensemble/cached"] = mix(test, prior.log(), mode=mode, temper=temper)
    rows["ensemble/fixed"] = mix(test, prior.log(), mode=PosteriorMode.fixed)
    if top_k:
        kept = keep_top_k(prior.log(), top_k)
        rows[f"ensemble/cached/top-{top_k}"] = mix(test, kept, mode=mode, temper=temper)
    return rows


def mix(
    test: ElmScores,
    log_prior: Tensor,
    *,
    mode: PosteriorMode = PosteriorMode.history,
    temper: float = 1.0,
    top_k: int | None = None,
) -> np.ndarray:
    """Log-probability of every token under the mixture; the posterior starts anew with each document."""
    return _join(
        mixture(logp, log_weights(logp, log_prior, mode=mode, temper=temper, top_k=top_k)) for logp in test.documents()
    )


def mix_updating(test: ElmScores, *, mode: PosteriorMode, temper: float) -> np.ndarray:
    """The same with a prior that follows the test documents already read."""
    prior = UpdatingPrior(test.logp.shape[0], mode=mode, temper=temper)
    parts = []
    for logp in test.documents():
        parts.append(mixture(logp, log_weights(logp, prior.log_prior, mode=mode, temper=temper)))
        prior.observe(logp)
    return _join(parts)


def _join(parts: Iterator[Tensor] | Sequence[Tensor]) -> np.ndarray:
    return torch.cat(list(parts)).numpy()
