"""Perplexity, bits per byte and intervals."""

import math

import numpy as np
import pytest

from btm.errors import DataError
from btm.evaluate.statistics import domain_score, resample_counts


def test_perplexity_and_bits_per_byte_follow_their_definitions() -> None:
    logp = np.log([0.5, 0.25, 0.125, 0.5, 0.5]).astype(np.float32)
    score = domain_score(logp, np.array([0, 2, 5]), np.array([4, 12]), samples=50, seed=0)
    bits = 1 + 2 + 3 + 1 + 1
    assert math.isclose(score.perplexity, 2 ** (bits / 5), rel_tol=1e-6)
    assert math.isclose(score.bits_per_byte, bits / 16, rel_tol=1e-6)
    assert score.tokens == 5


def test_the_interval_holds_the_perplexity_and_shrinks_with_documents() -> None:
    generator = np.random.default_rng(0)

    def width(documents: int) -> float:
        logp = -generator.gamma(2, size=documents * 20)
        starts = np.arange(documents + 1) * 20
        score = domain_score(logp, starts, np.full(documents, 60), samples=400, seed=1)
        assert score.low < score.perplexity < score.high
        return score.high - score.low

    assert width(400) < width(25) / 2


def test_the_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    """Documents have their own level, so that intervals over tokens would be far too narrow."""
    generator = np.random.default_rng(3)
    hits = 0
    for trial in range(200):
        level = generator.normal(3, 0.5, size=40)
        logp = -(np.repeat(level, 25) + generator.normal(0, 0.1, size=1000))
        score = domain_score(logp, np.arange(41) * 25, np.full(40, 50), samples=200, seed=trial)
        hits += score.low <= math.exp(3) <= score.high
    assert 0.86 < hits / 200 < 0.99


def test_one_document_has_an_interval_of_no_width() -> None:
    score = domain_score(np.array([-1.0, -2.0]), np.array([0, 2]), np.array([5]), samples=20, seed=0)
    assert math.isclose(score.low, score.high)
    assert math.isclose(score.low, score.perplexity)


def test_documents_without_tokens_do_not_count() -> None:
    logp = np.array([-1.0, -2.0, -3.0])
    without = domain_score(logp, np.array([0, 2, 3]), np.array([5, 2]), samples=20, seed=0)
    assert domain_score(logp, np.array([0, 0, 2, 2, 3, 3]), np.array([0, 5, 0, 2, 0]), samples=20, seed=0) == without


def test_models_on_the_same_documents_see_the_same_resamples() -> None:
    counts = resample_counts(7, samples=30, seed=5)
    assert np.array_equal(counts, resample_counts(7, samples=30, seed=5))
    assert not np.array_equal(counts, resample_counts(7, samples=30, seed=6))
    assert (counts.sum(1) == 7).all()


def test_a_hopeless_model_has_a_finite_perplexity() -> None:
    score = domain_score(np.full(4, -1e30), np.array([0, 4]), np.array([5]), samples=20, seed=0)
    assert math.isfinite(score.perplexity)


def test_nothing_to_measure_is_refused() -> None:
    with pytest.raises(DataError, match="at least one token"):
        domain_score(np.array([]), np.array([0]), np.array([]), samples=20, seed=0)
