"""Weights by Hugging Face names <-> Megatron's tensor-parallel slices, without Megatron."""

from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from btm.config_model import ModelConfig
from btm.model.causal_lm import build_model
from btm.train.flat import SHARED
from btm.train.megatron_layout import FlatLayout
from btm.train.megatron_mapping import Cut, Entry, entries_of, join, missing_names, split
from btm.train.megatron_shape import GptShape, shape_of

VOCABULARY = 61
MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama biases": {"tie_embeddings": False, "extra": {"attention_bias": True, "mlp_bias": True}},
    "mistral": {},
    "qwen2": {"tie_embeddings": False},
    "qwen3": {"extra": {"head_dim": 24}},
    "olmo2": {},
}


def random_model(name: str) -> PreTrainedModel:
    sizes = {"num_layers": 2, "hidden_size": 32, "num_heads": 8, "num_kv_heads": 4}
    model = build_model(
        ModelConfig(arch=name.split()[0], **(sizes | MODELS[name])), vocab_size=VOCABULARY, eos_id=0, seed=1
    )
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter.data)
    return model


def shape(model: PreTrainedModel) -> GptShape:
    return shape_of(model, sequence_length=16)


@pytest.mark.parametrize("tensor_parallel", [1, 2, 4])
@pytest.mark.parametrize("name", MODELS)
def test_every_weight_comes_back_with_its_bits(name, tensor_parallel):
    model = random_model(name)
    weights = dict(model.named_parameters())
    back: dict[str, torch.Tensor] = {}
    for entry in entries_of(shape(model)):
        shards = split(entry, [weights[source] for source in entry.sources], shape(model), tensor_parallel)
        assert len(shards) == tensor_parallel
        assert all(shard.is_contiguous() and shard.shape == shards[0].shape for shard in shards)
        back |= join(entry, shards, shape(model))
    assert back.keys() == weights.keys()
    for source, value in back.items():
        assert torch.equal(value, weights[source]), source


def sizes(**changes: Any) -> GptShape:
    model = random_model("llama")
    plain = shape(model)
    return GptShape(**{name: changes.get(name, getattr(plain, name)) for name in GptShape.__slots__})


def test_a_process_holds_the_queries_of_each_of_its_groups_with_its_key_and_value():
    """Two groups of two heads of width 1: rows are q0 q1 q2 q3, k0 k1, v0 v1."""
    tensors = [torch.tensor([[0.0], [1], [2], [3]]), torch.tensor([[10.0], [11]]), torch.tensor([[20.0], [21]])]
    entry = Entry("qkv", ("q", "k", "v"), Cut.qkv)
    layout = sizes(num_heads=4, num_groups=2, head_size=1)
    shards = split(entry, tensors, layout, 2)
    assert [shard.flatten().tolist() for shard in shards] == [[0, 1, 10, 20], [2, 3, 11, 21]]
    assert split(entry, tensors, layout, 1)[0].flatten().tolist() == [0, 1, 10, 20, 2, 3, 11, 21]


def test_gate_stands_before_up_on_every_process():
    tensors = [torch.arange(4.0)[:, None], 10 + torch.arange(4.0)[:, None]]
    shards = split(Entry("fc1", ("gate", "up"), Cut.gate_up), tensors, sizes(), 2)
    assert [shard.flatten().tolist() for shard in shards] == [[0, 1, 10, 11], [2, 3, 12, 13]]


def test_a_vocabulary_that_does_not_divide_gets_rows_of_zeros():
    entry = Entry("embedding", ("e",), Cut.vocabulary)
    layout = sizes(vocabulary=5)
    weight = 1 + torch.arange(10.0).view(5, 2)
    shards = split(entry, [weight], layout, 4)
    assert [len(shard) for shard in shards] == [2] * 4
    assert shards[2].tolist() == [[9, 10], [0, 0]]
    assert shards[3].tolist() == [[0, 0], [0, 0]]
    assert torch.equal(join(entry, shards, layout)["e"], weight)


def test_names_that_only_one_side_knows_are_found():
    entries = entries_of(sizes())
    names = {source: None for entry in entries for source in entry.sources}
    assert missing_names(entries, names) == []
    names["model.layers.0.self_attn.sinks"] = names.pop("model.norm.weight")
    assert missing_names(entries, names) == ["model.layers.0.self_attn.sinks", "model.norm.weight"]


def test_every_process_has_a_part_of_the_hidden_units_of_each_expert():
    stack = torch.arange(12.0).view(2, 1, 6)
    entry = Entry("w1", ("w",), Cut.units)
    shards = split(entry, [stack], sizes(), 3)
    assert [shard.flatten().tolist() for shard in shards] == [[0, 1, 6, 7], [2, 3, 8, 9], [4, 5, 10, 11]]
    assert torch.equal(join(entry, shards, sizes())["w"], stack)


def test_what_all_processes_have_is_one_stretch_and_every_place_has_one_owner():
    shapes = {"a": (3, 70), "b": (5,), "c": (4, 4), "d": (2, 64, 3), "e": (7,), "f": (9,)}
    entries = [Entry(name, (name,), Cut.copied if name in "bcf" else Cut.rows) for name in shapes]
    owners = {"d": (0, 1), "e": (1,), "f": (0,)}
    layout = FlatLayout.of(
        {name: torch.Size(shape) for name, shape in shapes.items()}, entries, owners, num_stretches=3
    )
    copied = sorted(layout.slots[name].begin for name in "bcf")
    others = [layout.slots[name].begin for name in "ade"]
    assert layout.copied.start == copied[0] <= copied[-1] < layout.copied.stop
    assert not any(layout.copied.start <= begin < layout.copied.stop for begin in others)
    assert layout.size % 3 == 0
    assert [span.begin for span in layout.spans] == [0, *(span.end for span in layout.spans[:-1])]
    assert layout.spans[-1].end == layout.size
    for name, slot in layout.slots.items():
        rows = owners.get(name, (SHARED,))
        for number, owner in enumerate(rows):
            place = slot.begin + number * (slot.end - slot.begin) // len(rows)
            (span,) = (span for span in layout.spans if span.begin <= place < span.end)
            assert (span.owner, span.is_decayed) == (owner, len(shapes[name]) > 1), name
    third = layout.size // 3
    parts = [layout.spans_of(slice(number * third, (number + 1) * third)) for number in range(3)]
    assert [sum(span.end - span.begin for span in part) for part in parts] == [third] * 3
