"""The domain posterior over ELMs, and the mixture that it weighs; pure functions in log space and float64.

Notation: ``E`` ELMs, ``T`` tokens of one document, ``l[j, t]`` the log-probability (nats) that ELM ``j`` gives token
``t`` after the tokens before it. All tensors have the ELMs first and the tokens last; further dimensions (documents of
equal length) may stand between.

The ensemble of Branch-Train-Merge (https://arxiv.org/abs/2208.03306, section 2.2, after DEMix,
https://arxiv.org/abs/2108.05036) is ``p(x_t | x_<t) = sum_j w[j, t] * exp(l[j, t])`` with
``w[j, t] = p(D = j | x_<t)``, which is proportional to ``prior[j] * p_j(x_<t)``.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from btm.config_ensemble import PosteriorMode, PriorEstimator
from btm.errors import EnsembleError

EMA_DECAY = 0.3
"""Weight of the newest batch in the moving average of the published scorers."""
EMA_BATCH_DOCUMENTS = 10
"""Documents per evaluation batch of the moving average."""
_EM_MAX_ITERATIONS = 500
_EM_TOLERANCE = 1e-9


def log_weights(
    logp: Tensor,
    log_prior: Tensor,
    *,
    mode: PosteriorMode = PosteriorMode.history,
    temper: float = 1.0,
    top_k: int | None = None,
) -> Tensor:
    """Log posterior over ELMs before each token, from the tokens before it alone.

    * ``history``: ``log_softmax_j(log prior + temper * sum_{s<t} l_s)``; at the first token this is the prior.
    * ``last_token``: what the published scorers compute, ``log_softmax_j(log prior + temper * l_{t-1})``, and equal
      weights (not the prior) at the first token.
    * ``fixed``: the prior at every token.

    Args:
        logp: ``l``, shape ``(E, ..., T)``; ``-inf`` counts as an impossible token.
        log_prior: Log prior, shape ``(E,)`` or ``(E, ...)``; need not be normalised; ``-inf`` leaves an ELM out.
        mode: What the posterior looks at.
        temper: Exponent of the likelihood in [0, 1]; 0 is the prior alone.
        top_k: ELMs kept at each token; None keeps all.

    Returns:
        Log weights ``(E, ..., T)``, float64; their exponentials sum to 1 over ELMs at every token.

    Raises:
        EnsembleError: If the shapes disagree, the prior is empty, or ``top_k`` is not in 1..E.
    """
    if not bool((log_prior > -torch.inf).any()):
        raise EnsembleError("the prior gives every ELM weight 0; give at least one ELM a positive weight")
    log_w = torch.log_softmax(log_joint(logp, log_prior, mode=mode, temper=temper), 0)
    return log_w if top_k is None else keep_top_k(log_w, top_k)


def log_joint(
    logp: Tensor, log_prior: Tensor, *, mode: PosteriorMode = PosteriorMode.history, temper: float = 1.0
) -> Tensor:
    """Log of prior times likelihood before each token: :func:`log_weights` before it is normalised over ELMs.

    Each ELM's row depends on that ELM alone, so that one ELM can be added to a mixture after the other.
    """
    prior = _broadcast_prior(log_prior, logp)
    evidence = temper * _finite(logp)
    if mode is PosteriorMode.history:
        # Not (sum to t) - l_t: rounding would leak the token into its own weight.
        before = torch.cat([torch.zeros_like(evidence[..., :1]), evidence[..., :-1].cumsum(-1)], -1)
        return prior + before
    if mode is PosteriorMode.last_token:
        first = torch.where(prior.isneginf(), prior, torch.zeros_like(prior)).expand_as(evidence[..., :1])
        return torch.cat([first, prior + evidence[..., :-1]], -1)
    return prior.expand_as(evidence)


def mixture(logp: Tensor, log_w: Tensor) -> Tensor:
    """Log-probability of each token under the ensemble, ``logsumexp_j(log w + l)``: shape ``(..., T)``, float64."""
    return torch.logsumexp(log_w.double() + _finite(logp), 0)


def keep_top_k(log_w: Tensor, top_k: int) -> Tensor:
    """Keep the ``top_k`` largest weights along the first dimension and renormalise; the others become ``-inf``.

    Among equal weights the ELM with the lower index is kept.

    Raises:
        EnsembleError: If ``top_k`` is not in 1..E.
    """
    num_elms = log_w.shape[0]
    if not 1 <= top_k <= num_elms:
        raise EnsembleError(f"ensemble.top_k must be between 1 and the number of ELMs, {num_elms}, got {top_k}")
    if top_k == num_elms:
        return log_w
    order = torch.sort(log_w, dim=0, descending=True, stable=True).indices
    dropped = torch.zeros_like(log_w, dtype=torch.bool).scatter_(0, order[top_k:], True)
    return torch.log_softmax(log_w.masked_fill(dropped, -torch.inf), 0)


def log_uniform_prior(num_elms: int) -> Tensor:
    """Log of the uniform prior ``1/E``: shape ``(E,)``, float64."""
    return torch.full((num_elms,), 1 / num_elms, dtype=torch.float64).log()


def log_prior_of(prior: dict[str, float] | None, names: Sequence[str]) -> Tensor:
    """Log prior over ``names`` in their order, renormalised; None is uniform. Names that ``prior`` lacks get 0.

    Raises:
        EnsembleError: If a weight is negative or not finite, a name is unknown, or nothing is left.
    """
    if prior is None:
        return log_uniform_prior(len(names))
    unknown = sorted(set(prior) - set(names))
    if unknown:
        raise EnsembleError(f"the prior names ELMs that are not in the ensemble: {unknown}; it has {list(names)}")
    weights = torch.tensor([prior.get(name, 0.0) for name in names], dtype=torch.float64)
    if not bool(torch.isfinite(weights).all()) or bool((weights < 0).any()) or not bool(weights.sum() > 0):
        raise EnsembleError(f"prior weights must be finite, at least 0 and not all 0, got {prior}")
    return (weights / weights.sum()).log()


class UpdatingPrior:
    """A prior that follows the documents already seen: a moving average over evaluation batches.

    With ``q_b`` the mean of the posterior over all tokens of batch ``b``, computed under the prior of the batches
    before it: ``pi_1 = q_1`` and ``pi_b = 0.7 * pi_{b-1} + 0.3 * q_b`` (Branch-Train-Merge and DEMix). The first batch
    is read under the uniform prior. A batch is ``EMA_BATCH_DOCUMENTS`` consecutive documents.
    """

    def __init__(
        self,
        num_elms: int,
        *,
        mode: PosteriorMode = PosteriorMode.history,
        temper: float = 1.0,
        batch_documents: int = EMA_BATCH_DOCUMENTS,
    ) -> None:
        self.log_prior = log_uniform_prior(num_elms)
        self._mode, self._temper, self._batch_documents = _posterior_mode(mode), temper, batch_documents
        self._sum = torch.zeros(num_elms, dtype=torch.float64)
        self._tokens = 0
        self._documents = 0
        self._batches = 0

    def observe(self, logp: Tensor) -> None:
        """Take in one document's log-probabilities ``(E, T)``; the prior changes when its batch is full."""
        weights = log_weights(logp, self.log_prior, mode=self._mode, temper=self._temper).exp()
        self._sum += weights.sum(-1)
        self._tokens += weights.shape[-1]
        self._documents += 1
        if self._documents == self._batch_documents:
            self.finish_batch()

    def finish_batch(self) -> None:
        """End the current batch early (the last one of a split); nothing happens when it is empty."""
        if not self._tokens:
            return
        newest = self._sum / self._tokens
        share = EMA_DECAY if self._batches else 1.0
        self.log_prior = ((1 - share) * self.log_prior.exp() + share * newest).log()
        self._sum = torch.zeros_like(self._sum)
        self._tokens = self._documents = 0
        self._batches += 1


def estimate_prior(
    documents: Sequence[Tensor],
    estimator: PriorEstimator = PriorEstimator.mean,
    *,
    temper: float = 1.0,
    mode: PosteriorMode = PosteriorMode.history,
) -> Tensor:
    """Cached prior: weights over ELMs that fit some development documents of a domain.

    * ``mean``: mean posterior over all tokens under a uniform prior; does not depend on the documents' order.
    * ``ema``: the updating prior after the last document, as the papers do it; depends on the order.
    * ``em``: weights of the fixed mixture with the highest likelihood (expectation maximisation from equal weights).

    Args:
        documents: Log-probabilities of each document, ``(E, T_n)``.
        estimator: Which of the three.
        temper: Exponent of the likelihood (not used by ``em``).
        mode: What the posterior looks at; ``fixed`` has none to average and uses ``history``.

    Returns:
        Prior ``(E,)``, float64, sums to 1.

    Raises:
        EnsembleError: If there are no documents.
    """
    if not documents:
        raise EnsembleError("a cached prior needs at least one dev document, got none")
    num_elms = documents[0].shape[0]
    if estimator is PriorEstimator.em:
        return _mixture_weights(torch.cat([_finite(logp) for logp in documents], -1))
    batch_documents = EMA_BATCH_DOCUMENTS if estimator is PriorEstimator.ema else len(documents)
    prior = UpdatingPrior(num_elms, mode=mode, temper=temper, batch_documents=batch_documents)
    for logp in documents:
        prior.observe(logp)
    prior.finish_batch()
    return prior.log_prior.exp()


def _mixture_weights(logp: Tensor) -> Tensor:
    """Maximise ``sum_n log sum_j w_j exp(l[j, n])`` over the simplex."""
    # Scaling each token by its best ELM keeps the ratios and avoids underflow.
    likelihood = (logp - logp.max(0).values).exp()
    weights = torch.full((len(likelihood),), 1 / len(likelihood), dtype=torch.float64)
    for _ in range(_EM_MAX_ITERATIONS):
        newer = weights * (likelihood / (weights @ likelihood)).mean(1)
        newer = newer / newer.sum()
        if bool((newer - weights).abs().max() < _EM_TOLERANCE):
            return newer
        weights = newer
    return weights


def _posterior_mode(mode: PosteriorMode) -> PosteriorMode:
    return PosteriorMode.history if mode is PosteriorMode.fixed else mode


def _finite(logp: Tensor) -> Tensor:
    """As float64, with ``-inf`` as the most negative float32: sums of it stay finite, differences of it vanish."""
    return logp.double().clamp_min(torch.finfo(torch.float32).min)


def _broadcast_prior(log_prior: Tensor, logp: Tensor) -> Tensor:
    if logp.ndim < 2 or log_prior.shape not in (logp.shape[:1], logp.shape[:-1]):
        raise EnsembleError(
            f"log-probabilities must be (ELMs, ..., tokens) with a prior (ELMs,) or (ELMs, ...), "
            f"got {tuple(logp.shape)} and {tuple(log_prior.shape)}"
        )
    return log_prior.double().reshape(*log_prior.shape, *[1] * (logp.ndim - log_prior.ndim))
