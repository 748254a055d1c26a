"""Properties of the domain posterior: P1-P5 and P7-P10 of the invariant list."""

import math

import pytest
import torch

from btm.config_ensemble import PosteriorMode, PriorEstimator
from btm.ensemble.posterior import (
    UpdatingPrior,
    estimate_prior,
    keep_top_k,
    log_prior_of,
    log_uniform_prior,
    log_weights,
    mixture,
)
from btm.errors import EnsembleError
from btm.merge.posterior import mean_posterior

HISTORY, LAST, FIXED = PosteriorMode.history, PosteriorMode.last_token, PosteriorMode.fixed
PRIOR = torch.tensor([0.5, 0.3, 0.15, 0.05], dtype=torch.float64)


def draw(num_elms: int = 4, num_tokens: int = 50, *, seed: int = 0, scale: float = 3.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return -scale * torch.rand(num_elms, num_tokens, generator=generator).add(0.1)


def best_grid_mixture(logp: torch.Tensor) -> float:
    """Highest log-likelihood of a fixed mixture of two ELMs on a fine grid."""
    shares = torch.linspace(0.001, 0.999, 999, dtype=torch.float64)
    pair = torch.stack([shares, 1 - shares]).log()
    return torch.logsumexp(pair[:, :, None] + logp.double()[:, None, :], 0).sum(-1).max().item()


@pytest.mark.parametrize("mode", list(PosteriorMode))
@pytest.mark.parametrize("top_k", [None, 1, 2])
@pytest.mark.parametrize("temper", [0.0, 0.3, 1.0])
def test_p1_weights_are_on_the_simplex_at_every_token(mode, top_k, temper) -> None:
    log_w = log_weights(draw(), PRIOR.log(), mode=mode, top_k=top_k, temper=temper)
    assert log_w.dtype == torch.float64
    assert torch.allclose(log_w.exp().sum(0), torch.ones(50, dtype=torch.float64), atol=1e-12)
    assert (log_w.exp() >= 0).all()


@pytest.mark.parametrize("mode", [HISTORY, FIXED])
def test_p2_the_first_weight_is_the_prior(mode) -> None:
    log_w = log_weights(draw(), PRIOR.log() + 7.0, mode=mode)
    assert torch.allclose(log_w[:, 0].exp(), PRIOR, atol=1e-12)


def test_p2_last_token_starts_with_equal_weights_as_the_published_scorers() -> None:
    log_w = log_weights(draw(), PRIOR.log(), mode=LAST)
    assert torch.allclose(log_w[:, 0].exp(), torch.full((4,), 0.25, dtype=torch.float64))
    expected = PRIOR * draw().double()[:, 6].exp()
    assert torch.allclose(log_w[:, 7].exp(), expected / expected.sum(), atol=1e-12)


@pytest.mark.parametrize("mode", [HISTORY, FIXED])
def test_p3_identical_elms_keep_the_prior_and_give_the_elm(mode) -> None:
    one = draw(1)
    logp = one.expand(4, -1)
    log_w = log_weights(logp, PRIOR.log(), mode=mode)
    assert torch.allclose(log_w.exp(), PRIOR[:, None].expand(4, 50), atol=1e-12)
    assert torch.allclose(mixture(logp, log_w), one[0].double(), atol=1e-12)


def test_p4_the_history_posterior_is_a_mixture_of_sequence_models() -> None:
    """The chain rule telescopes: sum_t log p_t = logsumexp_j(log prior_j + sum_t l)."""
    logp = draw(num_tokens=300)
    total = mixture(logp, log_weights(logp, PRIOR.log())).sum()
    direct = torch.logsumexp(PRIOR.log() + logp.double().sum(-1), 0)
    assert math.isclose(total.item(), direct.item(), rel_tol=1e-13)
    for other in (LAST, FIXED):
        assert abs(mixture(logp, log_weights(logp, PRIOR.log(), mode=other)).sum() - direct) > 1e-3


def test_p5_long_and_unlikely_documents_neither_overflow_nor_underflow() -> None:
    logp = draw(num_tokens=4096, scale=0.5) - 10
    log_w = log_weights(logp, PRIOR.log())
    token = mixture(logp, log_w)
    assert torch.isfinite(token).all()
    assert torch.allclose(log_w.exp().sum(0), torch.ones(4096, dtype=torch.float64), atol=1e-12)
    direct = torch.logsumexp(PRIOR.log() + logp.double().sum(-1), 0)
    assert math.isclose(token.sum().item(), direct.item(), rel_tol=1e-12)


@pytest.mark.parametrize("mode", list(PosteriorMode))
def test_p5_impossible_tokens_of_one_or_all_elms_give_no_nan(mode) -> None:
    logp = draw()
    logp[1, 10] = -torch.inf
    logp[:, 20] = -torch.inf
    log_w = log_weights(logp, PRIOR.log(), mode=mode)
    assert not log_w.isnan().any()
    assert not mixture(logp, log_w).isnan().any()
    if mode is HISTORY:
        assert log_w[1, 11].exp() == 0


@pytest.mark.parametrize("mode", list(PosteriorMode))
def test_p7_later_tokens_do_not_reach_earlier_weights(mode) -> None:
    logp, edited = draw(), draw()
    edited[:, 30:] = draw(seed=1)[:, 30:]
    before = log_weights(logp, PRIOR.log(), mode=mode, top_k=2)
    after = log_weights(edited, PRIOR.log(), mode=mode, top_k=2)
    assert torch.equal(before[:, :31], after[:, :31])
    if mode is not FIXED:
        assert not torch.equal(before[:, 31:], after[:, 31:])


@pytest.mark.parametrize("mode", list(PosteriorMode))
def test_p8_a_permutation_of_elms_permutes_the_weights_only(mode) -> None:
    logp, order = draw(), torch.tensor([2, 0, 3, 1])
    log_w = log_weights(logp, PRIOR.log(), mode=mode, top_k=3)
    permuted = log_weights(logp[order], PRIOR.log()[order], mode=mode, top_k=3)
    # The first token of last_token is a tie, which goes to the ELM that comes first.
    assert torch.allclose(permuted.exp()[:, 1:], log_w[order].exp()[:, 1:], atol=1e-12)
    assert torch.allclose(mixture(logp[order], permuted)[1:], mixture(logp, log_w)[1:], atol=1e-12)


def test_p9_top_k_of_all_elms_changes_nothing_and_fewer_keep_the_largest() -> None:
    logp = draw()
    full = log_weights(logp, PRIOR.log())
    assert torch.equal(log_weights(logp, PRIOR.log(), top_k=4), full)
    kept = log_weights(logp, PRIOR.log(), top_k=2)
    assert ((kept > -torch.inf).sum(0) == 2).all()
    largest = full.topk(2, 0).values
    assert torch.allclose(kept.topk(2, 0).values.exp(), (largest - largest.logsumexp(0)).exp(), atol=1e-12)


def test_p9_ties_keep_the_elm_that_comes_first() -> None:
    kept = keep_top_k(log_uniform_prior(5), 2)
    assert torch.equal(kept > -torch.inf, torch.tensor([True, True, False, False, False]))
    swapped = keep_top_k(torch.tensor([0.1, 0.4, 0.1, 0.4], dtype=torch.float64).log(), 3).exp()
    assert (swapped > 0).tolist() == [True, True, False, True]


@pytest.mark.parametrize("mode", list(PosteriorMode))
def test_p10_one_elm_is_itself_bit_for_bit(mode) -> None:
    logp = draw(1)
    assert torch.equal(mixture(logp, log_weights(logp, log_uniform_prior(1), mode=mode)), logp[0].double())


@pytest.mark.parametrize("mode", list(PosteriorMode))
def test_an_elm_with_prior_zero_changes_nothing(mode) -> None:
    """B4: adding an ELM with weight 0, or removing it, leaves the ensemble as it was."""
    logp = draw()
    without = mixture(logp[:3], log_weights(logp[:3], PRIOR[:3].log(), mode=mode))
    muted = torch.cat([PRIOR[:3], torch.zeros(1, dtype=torch.float64)])
    assert torch.allclose(mixture(logp, log_weights(logp, muted.log(), mode=mode)), without, atol=1e-12)


def test_temper_zero_is_the_fixed_mixture_and_one_the_history() -> None:
    logp = draw()
    fixed = log_weights(logp, PRIOR.log(), mode=FIXED)
    assert torch.allclose(log_weights(logp, PRIOR.log(), temper=0.0), fixed, atol=1e-12)
    half = log_weights(logp, PRIOR.log(), temper=0.5)
    assert torch.allclose(half, log_weights(logp / 2, PRIOR.log()), atol=1e-9)


def test_documents_of_equal_length_may_stand_in_a_batch() -> None:
    logp = torch.stack([draw(seed=1), draw(seed=2)], 1)
    together = log_weights(logp, PRIOR.log(), top_k=2)
    assert torch.equal(together[:, 1], log_weights(draw(seed=2), PRIOR.log(), top_k=2))


@pytest.mark.parametrize("estimator", list(PriorEstimator))
def test_estimators_give_a_distribution_that_prefers_the_fitting_elm(estimator) -> None:
    documents = [draw(seed=seed) for seed in range(23)]
    for logp in documents:
        logp[2] += 0.3
    prior = estimate_prior(documents, estimator)
    assert math.isclose(prior.sum().item(), 1.0, abs_tol=1e-12)
    assert prior.argmax() == 2


@pytest.mark.parametrize("estimator", [PriorEstimator.mean, PriorEstimator.em])
def test_mean_and_em_do_not_depend_on_the_order_of_documents(estimator) -> None:
    documents = [draw(seed=seed, num_tokens=5 + seed) for seed in range(30)]
    forward, backward = estimate_prior(documents, estimator), estimate_prior(documents[::-1], estimator)
    assert torch.allclose(forward, backward, atol=1e-9)


def test_the_posterior_average_weighs_as_the_cached_prior_does() -> None:
    """`btm merge` has its own numpy version, which must not need torch."""
    documents = [draw(seed=seed, num_tokens=5 + seed) for seed in range(30)]
    merged = mean_posterior([logp.numpy() for logp in documents])
    assert merged == pytest.approx(estimate_prior(documents, PriorEstimator.mean).tolist(), abs=1e-12)


def test_ema_depends_on_the_order_and_repeats_for_the_same_order() -> None:
    documents = [draw(seed=seed, num_tokens=5 + seed) for seed in range(30)]
    ema = estimate_prior(documents, PriorEstimator.ema)
    assert torch.equal(ema, estimate_prior(documents, PriorEstimator.ema))
    assert not torch.allclose(ema, estimate_prior(documents[::-1], PriorEstimator.ema), atol=1e-6)


def test_em_fits_dev_at_least_as_well_as_uniform_and_as_any_single_elm() -> None:
    documents = [draw(seed=seed) for seed in range(5)]
    joined = torch.cat(documents, -1).double()
    prior = estimate_prior(documents, PriorEstimator.em)
    fitted = mixture(joined, log_weights(joined, prior.log(), mode=FIXED)).sum()
    uniform = mixture(joined, log_weights(joined, log_uniform_prior(4), mode=FIXED)).sum()
    assert fitted >= uniform
    assert fitted >= joined.sum(-1).max()
    pair = [logp[:2] for logp in documents]
    em = estimate_prior(pair, PriorEstimator.em)
    reached = torch.logsumexp(em.log()[:, None] + joined[:2], 0).sum().item()
    assert reached >= best_grid_mixture(joined[:2]) - 1e-3


def test_updating_prior_follows_its_definition() -> None:
    """pi_1 = q_1 and pi_b = 0.7 pi_{b-1} + 0.3 q_b, q_b over all tokens of a batch under the prior before it."""
    first, second, third = (draw(seed=seed, num_tokens=20 + seed) for seed in range(3))
    prior = UpdatingPrior(4, batch_documents=2)
    prior.observe(first)
    assert torch.equal(prior.log_prior, log_uniform_prior(4))
    prior.observe(second)
    joined = torch.cat([log_weights(logp, log_uniform_prior(4)).exp() for logp in (first, second)], -1)
    assert torch.allclose(prior.log_prior.exp(), joined.mean(-1), atol=1e-12)
    prior.observe(third)
    prior.finish_batch()
    newest = log_weights(third, joined.mean(-1).log()).exp().mean(-1)
    assert torch.allclose(prior.log_prior.exp(), 0.7 * joined.mean(-1) + 0.3 * newest, atol=1e-12)
    settled = prior.log_prior.clone()
    prior.finish_batch()
    assert torch.equal(prior.log_prior, settled)


def test_updating_prior_converges_on_one_domain() -> None:
    prior, logp = UpdatingPrior(4, batch_documents=1), draw()
    logp[3] += 0.5
    for _ in range(60):
        prior.observe(logp)
    assert prior.log_prior.exp()[3] > 0.95


def test_prior_by_name_is_normalised_and_checked() -> None:
    prior = log_prior_of({"law": 3.0, "code": 1.0}, ["code", "law", "news"]).exp()
    assert torch.allclose(prior, torch.tensor([0.25, 0.75, 0.0], dtype=torch.float64))
    assert torch.equal(log_prior_of(None, ["a", "b"]), log_uniform_prior(2))
    with pytest.raises(EnsembleError, match="laws"):
        log_prior_of({"laws": 1.0}, ["law"])
    for weights in ({"law": -1.0}, {"law": 0.0}, {"law": math.nan}):
        with pytest.raises(EnsembleError, match="prior weights"):
            log_prior_of(weights, ["law"])


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(EnsembleError, match="top_k must be between 1 and the number of ELMs, 4, got 5"):
        log_weights(draw(), PRIOR.log(), top_k=5)
    with pytest.raises(EnsembleError, match=r"got \(4, 50\) and \(3,\)"):
        log_weights(draw(), PRIOR[:3].log())
    with pytest.raises(EnsembleError, match="every ELM weight 0"):
        log_weights(draw(), torch.full((4,), -torch.inf))
    with pytest.raises(EnsembleError, match="at least one dev document"):
        estimate_prior([])
