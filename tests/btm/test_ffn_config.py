"""Keys ``ffn.*``: which blocks get experts, and which combinations are refused with a remedy."""

import pytest

from btm.budget import model_size
from btm.config_ffn import FfnConfig
from btm.config_parse import parse_config
from btm.errors import ConfigError
from btm.plan import plan_run
from btm.plan_steps import Machine, PlanInput, StepKind


@pytest.mark.parametrize(
    ("layers", "num_layers", "blocks"),
    [
        ("all", 3, [0, 1, 2]),
        ("every_2", 5, [1, 3]),
        ("every_1", 2, [0, 1]),
        # Behind floor(i * L / (N + 1)) blocks, as BASE says: 24 blocks, one layer at 12, three at 6, 12, 18.
        ("spread_1", 24, [11]),
        ("spread_3", 24, [5, 11, 17]),
        ("spread_1", 1, [0]),
        ([3, 1], 4, [1, 3]),
    ],
)
def test_blocks(layers, num_layers, blocks):
    assert FfnConfig(layer="top_k", layers=layers).blocks(num_layers) == blocks


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        ({"layers": "some"}, "all, every_<k>, spread_<n>"),
        ({"layers": [1, 1]}, "different block numbers"),
        ({"layers": []}, "at least one"),
        ({"layers": "every_5"}, "beyond the 4"),
        ({"layers": [4]}, "beyond the 4"),
        ({"layers": "spread_4"}, "4 blocks apart"),
        ({"num_experts": 2, "experts_per_token": 3}, "at most ffn.num_experts (2), got 3"),
        ({"capacity_factor": 0}, "greater than 0"),
        ({"backend": "cuda"}, "ffn.backend"),
        ({"layer": "modality", "modality_starts": [5, 6]}, "ffn.modality_starts must hold 1 ascending"),
        ({"layer": "modality", "group_sizes": [1, 1, 1], "modality_starts": [6, 5]}, "2 ascending"),
        ({"layer": "modality", "group_sizes": [0, 1], "modality_starts": [5]}, "at least 1 each"),
        ({"layer": "topk"}, "got 'topk'"),
        ({"num_expert": 3}, "did you mean ffn.num_experts?"),
    ],
)
def test_wrong_values_are_named(raw, words):
    with pytest.raises(ConfigError) as caught:
        parse_config({"ffn": {"layer": "top_k"} | raw})
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        ({"model": {"arch": "gpt2"}}, "SwiGLU"),
        ({"baselines": {"random_split": True}}, "trains one model: set it to false"),
        ({"data": {"domains": {"a": "x", "b": "y"}, "weights": {"a": 2.0, "b": 1.0}}}, "must be equal"),
    ],
)
def test_what_one_sparse_model_cannot_have_is_refused(raw, words):
    with pytest.raises(ConfigError) as caught:
        parse_config({"ffn": {"layer": "demix"}} | raw)
    assert words in str(caught.value)
    parse_config(raw)


@pytest.mark.parametrize("layer", ["demix", "top_k"])
def test_a_sparse_model_takes_the_whole_budget_and_no_elm_is_branched(layer):
    config = parse_config({"ffn": {"layer": layer}, "baselines": {"dense": True}})
    size = model_size(config.model, config.tokenizer.vocab_size)
    given = PlanInput(config=config, machine=Machine(num_cpus=2), size=size, domains=["a", "b"], novel=["c"])
    steps = {step.name: step for step in plan_run(given)}
    trained = {name: step for name, step in steps.items() if step.kind is StepKind.train}
    assert list(trained) == ["sparse", "dense"]
    assert {step.updates for step in trained.values()} == {given.updates.total}
    scores = ["score/sparse/a", "score/sparse/b"] if layer == "demix" else ["score/sparse"]
    assert [name for name in steps if name.startswith("score/")] == [*scores, "score/dense"]
    assert set(steps["evaluate"].needs) == {*scores, "score/dense"}
    assert "seed" not in steps
