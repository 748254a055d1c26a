"""Average weighted by the domain posterior (Branch-Train-Merge, https://arxiv.org/abs/2208.03306, section 2.2).

The weights are the cached prior of the ensemble with the estimator ``mean``: the posterior over the whole history of
each dev document of the target domain, under a uniform prior, averaged over all tokens. Written in numpy, so that a
merge does not wait for torch.
"""

import itertools
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from btm.errors import MergeError
from btm.merge.request import MergeRequest, normalised

Array = np.ndarray[Any, np.dtype[Any]]


def posterior_weights(request: MergeRequest) -> list[float]:
    """Mean posterior of each model on the dev documents of the target domain.

    Raises:
        MergeError: If there is no target domain, or scores are missing, damaged, or of different documents.
    """
    domain = request.need_domain("posterior")
    paths = [_score_path(request, name, domain) for name in request.names]
    scores = [_load(path) for path in paths]
    starts = scores[0][1]
    for path, (logp, other) in zip(paths, scores, strict=True):
        if len(logp) != len(scores[0][0]) or not np.array_equal(starts, other):
            raise MergeError(f"{paths[0]} and {path} score different documents; score both again")
    documents = np.stack([logp for logp, _ in scores])
    return mean_posterior([documents[:, begin:end] for begin, end in itertools.pairwise(starts)])


def mean_posterior(documents: Sequence[Array]) -> list[float]:
    """Mean over all tokens of ``p(model | tokens before)`` under a uniform prior.

    Args:
        documents: Log-probabilities of each document's tokens, nats, shape ``(models, tokens)``.

    Returns:
        One weight per model; they sum to 1.
    """
    total = np.zeros(len(documents[0]))
    for logp in documents:
        evidence = np.maximum(logp.astype(np.float64), np.finfo(np.float32).min)
        # Not (sum to t) - l_t: rounding would leak the token into its own weight.
        before = np.zeros_like(evidence)
        np.cumsum(evidence[:, :-1], axis=1, out=before[:, 1:])
        odds = np.exp(before - before.max(axis=0))
        total += (odds / odds.sum(axis=0)).sum(axis=1)
    return normalised([float(value) for value in total])


def _score_path(request: MergeRequest, name: str, domain: str) -> Path:
    if name not in request.score_dirs:
        raise MergeError(f"method posterior needs scores of model {name!r} on dev-{domain}, got none; score it first")
    return request.score_dirs[name] / f"dev-{domain}.npz"


def _load(path: Path) -> tuple[Array, Array]:
    try:
        with np.load(path, allow_pickle=False) as scores:
            logp, starts = scores["logp"], scores["document_starts"]
    except FileNotFoundError:
        raise MergeError(f"{path} does not exist; score the model on the dev documents first") from None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise MergeError(f"{path} is not a score file ({str(error)[:200]}); score the model again") from None
    if logp.ndim != 1 or logp.dtype.kind != "f" or starts.ndim != 1 or starts.dtype.kind not in "iu":
        raise MergeError(f"{path} must hold one row of log-probabilities and one of document starts; score it again")
    if len(starts) < 2 or starts[0] != 0 or starts[-1] != len(logp) or bool((np.diff(starts) <= 0).any()):
        raise MergeError(f"{path} holds no documents or its document starts do not fit; score the model again")
    if bool(np.isnan(logp).any()):
        raise MergeError(f"{path} holds NaN; the model is damaged: leave it out or train it again")
    return logp, starts
