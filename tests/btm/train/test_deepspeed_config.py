"""What the keys of engine=deepspeed take and refuse, before anything runs."""

import sys

import pytest
import torch

from btm.config_ffn import FfnConfig
from btm.config_model import OWNED_DEEPSPEED_KEYS, EngineConfig, ModelConfig
from btm.config_parse import key_problem, parse_config
from btm.config_train import TrainConfig
from btm.errors import ConfigError, TrainingError
from btm.model.causal_lm import build_model
from btm.model.sparse_lm import add_experts
from btm.train.deepspeed_config import deepspeed_config
from btm.train.deepspeed_engine import DeepSpeedEngine
from btm.train.ranks import Ranks

DEEPSPEED = {"name": "deepspeed"}
SIZES = ModelConfig(num_layers=1, hidden_size=32, num_heads=2)


@pytest.mark.parametrize(
    ("engine", "words"),
    [
        ({"zero_stage": 3}, "engine.zero_stage needs engine=deepspeed"),
        ({"offload": "optimizer"}, "engine.offload needs engine=deepspeed"),
        ({"deepspeed": {"aio": {}}}, "engine.deepspeed needs engine=deepspeed"),
        (DEEPSPEED | {"zero_stage": 4}, "engine.zero_stage must be less than or equal to 3"),
        (DEEPSPEED | {"zero_stage": 2, "offload": "all"}, "needs engine.zero_stage of at least 3, got 2"),
        (DEEPSPEED | {"zero_stage": 0, "offload": "optimizer"}, "needs engine.zero_stage of at least 1, got 0"),
        (DEEPSPEED | {"deepspeed": {"optimizer": {"type": "Lion"}}}, "follows from other keys; set train.lr"),
        (DEEPSPEED | {"deepspeed": {"zero_optimization": {"stage": 3}}}, "set engine.zero_stage instead"),
        (
            DEEPSPEED | {"deepspeed": {"zero_optimization": {"offload_optimizer": {"device": "nvme"}}}},
            "offload to NVMe is not supported",
        ),
        (DEEPSPEED | {"deepspeed": {"zero_optimisation": {}}}, "engine.deepspeed.zero_optimisation is not taken"),
        (DEEPSPEED | {"deepspeed": {"zero_optimization": 3}}, "must be a table of keys, got 3"),
    ],
)
def test_clashes_are_refused_with_the_key_to_set(engine, words):
    with pytest.raises(ConfigError) as caught:
        parse_config({"engine": engine})
    assert words in str(caught.value)


def test_every_owned_key_is_refused_wherever_it_stands():
    for path in OWNED_DEEPSPEED_KEYS:
        given: dict = {}
        *tables, last = path.split(".")
        table = given
        for name in tables:
            table = table.setdefault(name, {})
        table[last] = True
        with pytest.raises(ConfigError, match=path.replace(".", r"\.")):
            parse_config({"engine": DEEPSPEED | {"deepspeed": given}})


def test_expert_layers_under_zero_3_are_refused_with_the_remedy():
    engine = DEEPSPEED | {"zero_stage": 3}
    remedy = "set engine.zero_stage to 0, 1 or 2 and share out experts by engine.expert_parallel, or use engine=torch"
    with pytest.raises(ConfigError, match=remedy):
        parse_config({"engine": engine, "ffn": {"layer": "top_k"}})
    model = build_model(SIZES, vocab_size=61, eos_id=0, seed=1)
    add_experts(model, FfnConfig(layer="top_k"), ["a"], seed=1, is_pretrained=False)
    with pytest.raises(ConfigError, match=remedy):
        DeepSpeedEngine(model, train=TrainConfig(), config=EngineConfig(**engine), ranks=Ranks())


@pytest.mark.parametrize(
    ("ffn", "count"),
    [({"layer": "base", "num_experts": 5}, 5), ({"layer": "modality", "group_sizes": [1, 2]}, 3)],
)
def test_experts_that_cannot_be_shared_out_equally_are_refused_with_the_remedy(ffn, count):
    engine = DEEPSPEED | {"num_processes": 2, "expert_parallel": 2}
    words = (
        f"engine.expert_parallel=2 must divide the {count} experts of a layer; choose another number of experts, or use"
    )
    with pytest.raises(ConfigError, match=words):
        parse_config({"engine": engine, "ffn": ffn, "launch": {"cpus_per_elm": 2}, "data": {"images": ["a"]}})
    model = build_model(SIZES, vocab_size=61, eos_id=0, seed=1)
    starts = {"modality_starts": [30]} if ffn["layer"] == "modality" else {}
    add_experts(model, FfnConfig(**ffn, **starts), ["a"], seed=1, is_pretrained=False)
    with pytest.raises(ConfigError, match=words):
        DeepSpeedEngine(model, train=TrainConfig(), config=EngineConfig(**engine), ranks=Ranks())


def test_frozen_weights_are_refused():
    model = build_model(SIZES, vocab_size=61, eos_id=0, seed=1)
    next(model.parameters()).requires_grad_(False)
    with pytest.raises(ConfigError, match=r"frozen ones \(model\.embed_tokens\.weight\); use engine=torch"):
        DeepSpeedEngine(model, train=TrainConfig(), config=EngineConfig(**DEEPSPEED), ranks=Ranks())


def test_deepspeed_that_is_not_there_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)  # no group is left behind
    model = build_model(SIZES, vocab_size=61, eos_id=0, seed=1)
    with pytest.raises(TrainingError, match="pip install deepspeed, or use engine=torch"):
        DeepSpeedEngine(model, train=TrainConfig(), config=EngineConfig(**DEEPSPEED), ranks=Ranks())


def test_further_keys_reach_deepspeed_and_ours_stay_ours():
    given = {"zero_optimization": {"reduce_bucket_size": 1000}, "wall_clock_breakdown": True}
    config = parse_config({"engine": DEEPSPEED | {"zero_stage": 3, "offload": "all", "deepspeed": given}}).engine
    settings = deepspeed_config(config, 10_001)
    assert settings["zero_optimization"]["reduce_bucket_size"] == 1000
    assert settings["zero_optimization"]["allgather_bucket_size"] == 10_002
    assert settings["zero_optimization"]["stage"] == 3
    assert settings["zero_optimization"]["offload_param"]["device"] == "cpu"
    assert settings["wall_clock_breakdown"] is True
    assert settings["bf16"] == {"enabled": True}
    assert "stage" not in config.deepspeed["zero_optimization"]


def test_keys_of_the_open_table_are_known_to_the_command_line():
    assert key_problem("engine.deepspeed.zero_optimization.reduce_bucket_size") is None
    assert "did you mean engine.zero_stage" in str(key_problem("engine.zero_stag"))
