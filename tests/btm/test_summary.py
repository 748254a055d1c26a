import pytest

from btm.records import DomainScore, Evaluation, ModelScores
from btm.summary import relations


def evaluation(domains, **perplexities):
    """Rows by name (``/`` written as two underscores), the same perplexity on every domain."""

    def score(value):
        return DomainScore(perplexity=value, low=value, high=value, bits_per_byte=1.0, tokens=100)

    models = {
        name.replace("__", "/"): ModelScores(domains={domain: score(value) for domain in domains})
        for name, value in perplexities.items()
    }
    return Evaluation(domains=domains, novel_domains=[], models=models, sequence_length=32)


def test_a_forest_is_judged_against_its_baselines():
    found = relations(evaluation(["a", "b"], dense=10.0, ensemble__uniform=9.0, random_split__ensemble=8.0))
    assert [(item["left"], item["right"], item["holds"]) for item in found] == [
        (pytest.approx(9.0), pytest.approx(10.0), True),
        (pytest.approx(9.0), pytest.approx(8.0), False),
    ]


def test_the_averages_of_a_single_elm_are_not_compared():
    assert relations(evaluation(["a"], average__posterior=5.0, average__uniform=5.0)) == []


def test_a_sparse_model_is_judged_with_a_single_domain_too():
    (found,) = relations(evaluation(["a"], sparse=9.0, dense=10.0, ensemble__uniform=9.0))
    assert found["holds"]
    assert found["claim"].startswith("the sparse model")
