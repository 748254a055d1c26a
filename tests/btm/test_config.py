"""The configuration: defaults hold, mistakes are named all together, every YAML composes."""

from pathlib import Path

import pytest
import yaml

from btm.config import Config
from btm.config_parse import config_to_dict, key_problem, parse_config
from btm.config_train import BranchOptimizer, BranchSource
from btm.errors import ConfigError

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


def test_defaults_are_valid_and_survive_a_round_trip():
    config = parse_config({})
    assert parse_config(config_to_dict(config)) == config
    assert config_to_dict(config)["branch"]["from"] == "seed"


def test_all_problems_are_listed_together():
    raw = {
        "train": {"lr": -1, "tokenz": 3},
        "branch": {"from": "sed"},
        "data": {"domains": {"../x": "path"}},
        "trian": {},
    }
    with pytest.raises(ConfigError) as caught:
        parse_config(raw)
    text = str(caught.value)
    assert len(caught.value.problems) == 4
    assert "did you mean train.tokens?" in text
    assert "did you mean train?" in text
    assert "train.lr must be greater than 0, got -1" in text
    assert "'seed', 'nearest', 'uniform' or 'posterior', got 'sed'" in text


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (
            {"train": {"batch_tokens": 1000, "sequence_length": 256}},
            "multiple of train.sequence_length (256), got 1000",
        ),
        ({"train": {"tokens": 10}}, "at least one batch"),
        ({"train": {"sequence_length": 4096, "batch_tokens": 8192}}, "at most model.max_positions (2048), got 4096"),
        ({"data": {"domains": {"a": "x"}, "novel": {"A": "y"}}}, "name every domain once"),
        ({"data": {"domains": {"a": "x"}, "weights": {"b": 1}}}, "unknown domains ['b']"),
        ({"data": {"dev_fraction": 0.48, "test_fraction": 0.48}}, "below 0.9"),
        ({"model": {"hidden_size": 100, "num_heads": 3}}, "multiple of model.num_heads (3)"),
        ({"model": {"hidden_size": 64, "num_heads": 4, "num_kv_heads": 3}}, "multiple of model.num_kv_heads, got 3"),
        ({"model": {"extra": {"api_key": "x"}}}, "secrets come from the environment"),
        ({"branch": {"from": "uniform"}}, "set branch.optimizer=reset"),
        ({"train": {"optimizer": "adamw_8bit"}}, "is not supported: in a trial"),
        ({"train": {"optimizer": "adam_8bit"}}, "train.optimizer must be 'adamw' or 'adamw_8bit', got 'adam_8bit'"),
        ({"merge": {"method": "weighted"}}, "needs merge.weights"),
        ({"merge": {"method": "weighted", "weights": {"a": -1}}}, "at least 0"),
        ({"name": "../x"}, "cannot be a name"),
        ({"engine": {"num_processes": 2}}, "launch.cpus_per_elm must be at least"),
    ],
)
def test_contradictions_are_named(raw, words):
    with pytest.raises(ConfigError) as caught:
        parse_config(raw)
    assert words in str(caught.value)


def test_unknown_keys_suggest_the_nearest():
    assert key_problem("train.lr") is None
    assert key_problem("data.domains.anything") is None
    assert key_problem("branch.from") is None
    assert "did you mean merge.method?" in (key_problem("merge.metod") or "")


def test_enums_by_their_yaml_names():
    config = parse_config({"branch": {"from": "posterior", "optimizer": "reset"}})
    assert config.branch.source is BranchSource.posterior
    assert config.branch.optimizer is BranchOptimizer.reset


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*/*.yaml")), ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_yaml_holds_known_keys(path):
    content = yaml.safe_load(path.read_text()) or {}
    prefix = "" if path.parent.name == "experiment" else f"{path.parent.name}."
    problems = [key_problem(prefix + key) for key in _leaves(content)]
    assert [problem for problem in problems if problem] == []


def test_every_field_is_documented():
    undocumented = []
    for name, field in Config.model_fields.items():
        model = field.annotation
        for key, inner in getattr(model, "model_fields", {}).items():
            if not inner.description:
                undocumented.append(f"{name}.{key}")
    assert undocumented == []


def _leaves(content, prefix=""):
    for key, value in content.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"
