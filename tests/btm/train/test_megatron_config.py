"""What engine=megatron takes and refuses, before anything is trained."""

import sys

import pytest
import torch

from btm.config_ffn import FfnConfig
from btm.config_model import EngineConfig, ModelConfig
from btm.config_parse import parse_config
from btm.config_train import TrainConfig
from btm.errors import ConfigError, TrainingError
from btm.model.causal_lm import build_model
from btm.model.sparse_lm import add_experts
from btm.train.megatron_engine import MegatronEngine
from btm.train.megatron_shape import shape_of
from btm.train.ranks import Ranks

MEGATRON = {"name": "megatron"}
TWO = {"num_processes": 2, "tensor_parallel": 2}


def model(arch: str = "llama", **changes):
    sizes = {"num_layers": 1, "hidden_size": 32, "num_heads": 2} | changes
    return build_model(ModelConfig(arch=arch, **sizes), vocab_size=61, eos_id=0, seed=1)


def engine(of, *, ranks: Ranks | None = None, length: int = 16, **config) -> MegatronEngine:
    train = TrainConfig(sequence_length=length, batch_tokens=16 * length)
    return MegatronEngine(of, train=train, config=EngineConfig(**MEGATRON, **config), ranks=ranks or Ranks())


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"tensor_parallel": 2}, "engine.tensor_parallel needs engine=megatron, got engine=torch"),
        ({"name": "deepspeed", "sequence_parallel": True}, "engine.sequence_parallel needs engine=megatron"),
        (MEGATRON | {"zero_stage": 1}, "engine.zero_stage needs engine=deepspeed, got engine=megatron"),
        (MEGATRON | {"offload": "optimizer"}, "engine.offload needs engine=deepspeed"),
        (MEGATRON | {"tensor_parallel": 0}, "engine.tensor_parallel must be greater than or equal to 1"),
        (MEGATRON | {"num_processes": 3, "tensor_parallel": 2}, "engine.tensor_parallel=2 must divide the 3 processes"),
        (MEGATRON | {"sequence_parallel": True}, "needs engine.tensor_parallel of at least 2, got 1"),
    ],
)
def test_keys_that_contradict_each_other_are_refused_with_the_remedy(given, words):
    with pytest.raises(ConfigError) as caught:
        parse_config({"engine": given, "launch": {"cpus_per_elm": 4}})
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"arch": "gpt2"}, "got model.arch='gpt2'; use engine=torch"),
        ({"num_heads": 3, "hidden_size": 48}, "must divide model.num_heads (3)"),
        ({"num_heads": 4, "num_kv_heads": 1}, "must divide model.num_kv_heads (1)"),
    ],
)
def test_models_from_scratch_that_cannot_be_shared_out_are_refused_by_their_keys(given, words):
    with pytest.raises(ConfigError) as caught:
        parse_config({"engine": MEGATRON | TWO, "model": given, "launch": {"cpus_per_elm": 2}})
    assert words in str(caught.value)


def test_gpus_count_as_processes():
    config = {"engine": MEGATRON | {"tensor_parallel": 4}, "model": {"num_heads": 4}, "launch": {"gpus_per_elm": 4}}
    assert parse_config(config).engine.tensor_parallel == 4


def sparse(**ffn):
    given = model(intermediate_size=48)
    return add_experts(given, FfnConfig(**ffn), ["a"], seed=1, is_pretrained=False)


def test_expert_layers_are_taken_and_a_width_that_does_not_divide_is_refused():
    assert parse_config({"engine": MEGATRON, "ffn": {"layer": "top_k"}}).ffn.is_sparse
    words = r"tensor_parallel=2 must divide the feed-forward width of an expert, ffn.hidden_width, \(21\)"
    for layer in ("top_k", "base", "modality"):
        given = sparse(layer=layer, hidden_width=21, modality_starts=[30])
        with pytest.raises(ConfigError, match=words):
            engine(given, ranks=Ranks(0, 2), tensor_parallel=2)


@pytest.mark.parametrize(
    ("processes", "ffn", "words"),
    [
        (4, {"layer": "top_k", "num_experts": 5}, "engine=megatron shares out experts equally"),
        (2, {"layer": "top_k"}, "engine.expert_parallel=2 times engine.tensor_parallel=2 must divide the 2 processes"),
        (4, {}, "engine.expert_parallel=2 needs expert layers"),
    ],
)
def test_experts_that_cannot_be_shared_out_are_refused_with_the_remedy(processes, ffn, words):
    given = MEGATRON | {"num_processes": processes, "tensor_parallel": 2, "expert_parallel": 2}
    with pytest.raises(ConfigError) as caught:
        parse_config({"engine": given, "ffn": ffn, "launch": {"cpus_per_elm": 4}})
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("arch", "extra", "words"),
    [
        ("gpt2", {}, "trains llama, mistral, olmo2, qwen2, qwen3 models, got 'gpt2'; use engine=torch"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ("llama", {"attention_dropout": 0.1}, "attention_dropout=0.1; set it to 0"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "has 'dynamic'"),
        ("mistral", {"sliding_window": 8}, "window of 8 tokens and train.sequence_length is 16"),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0}, "window of 8 tokens"),
    ],
)
def test_what_megatron_would_compute_otherwise_is_refused(arch, extra, words):
    with pytest.raises(ConfigError) as caught:
        engine(model(arch, extra=extra))
    assert words in str(caught.value)


def test_a_window_that_no_sequence_exceeds_is_no_obstacle():
    assert shape_of(model("mistral", extra={"sliding_window": 16}), sequence_length=16).num_layers == 1


def test_weights_that_nobody_knows_are_refused_by_name():
    odd = model()
    odd.model.layers[0].self_attn.register_parameter("sinks", torch.nn.Parameter(torch.zeros(2)))
    with pytest.raises(ConfigError, match=r"does not know what model\.layers\.0\.self_attn\.sinks"):
        engine(odd)


def test_frozen_weights_are_refused():
    frozen = model()
    next(frozen.parameters()).requires_grad_(False)
    with pytest.raises(ConfigError, match=r"frozen ones \(model\.embed_tokens\.weight\); use engine=torch"):
        engine(frozen)


def test_sizes_that_do_not_divide_are_all_listed():
    ranks = Ranks(0, 4)
    odd = model(num_heads=4, num_kv_heads=2, intermediate_size=42)
    with pytest.raises(ConfigError) as caught:
        engine(odd, ranks=ranks, length=18, tensor_parallel=4, sequence_parallel=True)
    for words in ("key and value heads (2)", "the feed-forward width (42)", "train.sequence_length", "(18)"):
        assert words in str(caught.value)
    assert "attention heads" not in str(caught.value)
    with pytest.raises(ConfigError, match="tensor_parallel=3 must divide the 4 processes"):
        engine(model(), ranks=ranks, tensor_parallel=3)


def test_megatron_that_is_not_there_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "megatron", None)
    monkeypatch.setitem(sys.modules, "megatron.core", None)
    with pytest.raises(TrainingError, match="pip install megatron-core, or use engine=torch"):
        engine(model())
