"""The table of methods, and the weights that each method gives."""

import itertools
import math
import random
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from btm.config_merge import MergeMethodName
from btm.ensemble.posterior import estimate_prior
from btm.errors import MergeError
from btm.merge.greedy_soup import greedy_soup_weights
from btm.merge.methods import MERGE_METHODS
from btm.merge.posterior import mean_posterior, posterior_weights
from btm.merge.request import MergeRequest

CONFIGS = Path(__file__).parents[3] / "configs/merge"


def write_scores(folder, documents):
    folder.mkdir(exist_ok=True)
    starts = np.cumsum([0, *(len(document) for document in documents)])
    np.savez(folder / "dev-law.npz", logp=np.concatenate(documents), document_starts=starts)
    return folder


def scored_request(tmp_path, seed=0, models=3):
    generator = np.random.default_rng(seed)
    lengths = [1, 7, 40]
    scores = [[-generator.exponential(4, n).astype(np.float32) for n in lengths] for _ in range(models)]
    folders = {f"m{i}": write_scores(tmp_path / f"m{i}", documents) for i, documents in enumerate(scores)}
    return scores, MergeRequest(names=list(folders), domain="law", score_dirs=folders)


def test_the_table_covers_every_name_and_every_name_has_a_configuration():
    assert set(MERGE_METHODS) == set(MergeMethodName)
    assert {path.stem for path in CONFIGS.glob("*.yaml")} == {name.value for name in MergeMethodName}
    for name, method in MERGE_METHODS.items():
        assert method.reference.startswith("https://arxiv.org/abs/")
        assert yaml.safe_load((CONFIGS / f"{name.value}.yaml").read_text())["method"] == name.value


@pytest.mark.parametrize("name", list(MergeMethodName))
def test_every_method_gives_one_weight_per_model_that_sum_to_1(tmp_path, name):
    _, scored = scored_request(tmp_path)
    request = MergeRequest(
        names=scored.names,
        domain="law",
        score_dirs=scored.score_dirs,
        weights={"m0": 3.0, "m2": 1.0},
        loss_of=lambda names: 3.0 - len(names),
    )
    weights = MERGE_METHODS[name].weigh(request)
    assert len(weights) == 3
    assert min(weights) >= 0
    assert sum(weights) == pytest.approx(1, abs=1e-12)
    assert {MergeMethodName.uniform: [1 / 3] * 3, MergeMethodName.weighted: [0.75, 0, 0.25]}.get(
        name, weights
    ) == pytest.approx(weights)


@pytest.mark.parametrize("seed", range(4))
def test_posterior_weights_equal_those_of_the_ensemble(tmp_path, seed):
    scores, request = scored_request(tmp_path, seed)
    documents = [torch.stack([torch.from_numpy(model[n]) for model in scores]) for n in range(3)]
    assert posterior_weights(request) == pytest.approx(estimate_prior(documents).tolist(), abs=1e-12)


def test_posterior_stays_finite_on_long_and_on_impossible_documents():
    logp = np.full((2, 5000), -12.0, np.float32)
    logp[1] -= 0.5
    weights = mean_posterior([logp])
    assert sum(weights) == pytest.approx(1)
    assert weights[0] > 0.99
    logp[:, 3] = -np.inf
    torch_weights = estimate_prior([torch.from_numpy(logp)]).tolist()
    assert mean_posterior([logp]) == pytest.approx(torch_weights)


def test_posterior_of_equal_models_is_uniform_and_of_one_token_is_the_prior(tmp_path):
    same = np.full(9, -2.0, np.float32)
    assert mean_posterior([np.stack([same] * 4)]) == [0.25] * 4
    assert mean_posterior([np.array([[-1.0], [-9.0]], np.float32)]) == [0.5, 0.5]


def damaged(tmp_path, how):
    _, request = scored_request(tmp_path)
    path = tmp_path / "m1/dev-law.npz"
    if how == "missing":
        path.unlink()
    elif how == "truncated":
        path.write_bytes(path.read_bytes()[:100])
    elif how == "pickle":
        np.savez(path, logp=np.array([{}]), document_starts=np.array([0, 1]))
    elif how == "other documents":
        write_scores(tmp_path / "m1", [np.zeros(48, np.float32)])
    elif how == "NaN":
        write_scores(tmp_path / "m1", [np.full(n, np.nan, np.float32) for n in (1, 7, 40)])
    elif how == "starts":
        np.savez(path, logp=np.zeros(48, np.float32), document_starts=np.array([0, 50, 48]))
    elif how == "whole numbers":
        np.savez(path, logp=np.zeros(48, np.int64), document_starts=np.array([0, 1, 8, 48]))
    return request


@pytest.mark.parametrize("how", ["missing", "truncated", "pickle", "other documents", "NaN", "starts", "whole numbers"])
def test_damaged_scores_are_named(tmp_path, how):
    with pytest.raises(MergeError, match=r"m1/dev-law\.npz"):
        posterior_weights(damaged(tmp_path, how))


def test_methods_say_what_they_miss():
    with pytest.raises(MergeError, match="needs a target domain"):
        posterior_weights(MergeRequest(names=["a"]))
    with pytest.raises(MergeError, match="needs scores of model 'a' on dev-law"):
        posterior_weights(MergeRequest(names=["a"], domain="law"))
    with pytest.raises(MergeError, match="needs a target domain"):
        greedy_soup_weights(MergeRequest(names=["a"], loss_of=lambda names: 1.0))
    with pytest.raises(MergeError, match="needs dev documents of 'law'"):
        greedy_soup_weights(MergeRequest(names=["a"], domain="law"))


def soup(losses, names=None):
    """Run the soup on a table from sets of names to losses; returns what it kept and what it asked for."""
    names = names or sorted({name for kept in losses for name in kept})
    asked = []

    def loss_of(chosen):
        asked.append(tuple(chosen))
        return losses[frozenset(chosen)]

    weights = greedy_soup_weights(MergeRequest(names=names, domain="law", loss_of=loss_of))
    return {name: weight for name, weight in zip(names, weights, strict=True) if weight}, asked


def test_soup_adds_in_order_of_loss_and_keeps_what_does_not_hurt():
    table = {"a": 2.0, "b": 1.0, "c": 3.0, "ab": 1.0, "abc": 1.1}
    kept, asked = soup({frozenset(names): loss for names, loss in table.items()})
    assert kept == {"a": 0.5, "b": 0.5}
    assert asked == [("a",), ("b",), ("c",), ("a", "b"), ("a", "b", "c")]


def test_soup_skips_a_harmful_model_and_goes_on():
    table = {"a": 1.0, "b": 2.0, "c": 3.0, "ab": float("nan"), "ac": 0.9}
    assert soup({frozenset(names): loss for names, loss in table.items()})[0] == {"a": 0.5, "c": 0.5}


def test_soup_refuses_a_model_without_a_finite_loss():
    with pytest.raises(MergeError, match="model 'b' has loss nan on dev-law"):
        soup({frozenset("a"): 1.0, frozenset("b"): math.nan})


@pytest.mark.parametrize("seed", range(20))
def test_m5_soup_is_never_worse_than_the_best_model_and_ignores_the_order_of_names(seed):
    generator, names = random.Random(seed), "abcde"
    table = {frozenset(kept): generator.random() for n in range(1, 6) for kept in itertools.combinations(names, n)}
    kept, asked = soup(table)
    assert table[frozenset(kept)] <= min(table[frozenset(name)] for name in names)
    assert len(asked) == 2 * len(names) - 1
    for _ in range(5):
        shuffled = generator.sample(names, 5)
        assert soup(table, shuffled)[0] == kept
