"""`launch.nodes_per_elm`: what a plan on several nodes asks for, and what is refused before anything trains."""

from pathlib import Path

import pytest

from btm.budget import divide_updates, model_size
from btm.config_parse import parse_config
from btm.errors import ConfigError
from btm.machine import machine
from btm.plan import plan_run
from btm.plan_steps import Machine, PlanInput
from btm.session import check_nodes
from btm.step_context import Context

RECIPE = {"batch_tokens": 3 * 64 * 24, "sequence_length": 64}
TWO_NODES = {"executor": "slurm", "nodes_per_elm": 2, "cpus_per_elm": 32, "gpus_per_elm": 16}


def configuration(launch, **raw):
    domains = {name: f"{name}.txt" for name in ("a", "b", "c")}
    return parse_config({"data": {"domains": domains}, "train": RECIPE, "launch": launch, **raw})


def steps(config, where: Machine | None = None):
    size = model_size(config.model, config.tokenizer.vocab_size)
    given = PlanInput(config=config, machine=where or machine(config), size=size, domains=("a", "b", "c"))
    return {step.name: step for step in plan_run(given)}


def size_of(step):
    return step.num_nodes, step.num_processes, step.num_cpus, step.num_gpus


def test_trainings_are_spread_over_nodes_and_everything_else_runs_on_one():
    found = steps(configuration(TWO_NODES))
    # 24 sequences per ELM and update: 12 is the most of up to 16 that divides them and that two nodes share out.
    assert size_of(found["elm/a"]) == (2, 12, 32, 12)
    assert size_of(found["seed"]) == (2, 12, 32, 12)
    assert size_of(found["prepare"]) == (1, 1, 16, 0)
    assert size_of(found["score/elm/a"]) == (1, 1, 16, 1)


def test_seed_and_sparse_model_may_have_nodes_of_their_own():
    config = configuration(
        {"executor": "slurm", "gpus_per_elm": 2, "cpus_per_elm": 2, "slurm": {"num_nodes": 3, "gpus_per_node": 8}}
    )
    assert size_of(steps(config)["seed"]) == (3, 24, 24, 24)
    assert size_of(steps(config)["elm/a"]) == (1, 2, 2, 2)


def test_some_elms_may_have_several_nodes():
    groups = {"wide": {"elms": ["b"], "nodes_per_elm": 2, "gpus_per_elm": 8, "cpus_per_elm": 8}}
    found = steps(configuration({"executor": "slurm", "cpus_per_elm": 2, "groups": groups}))
    assert size_of(found["elm/b"]) == (2, 8, 8, 8)
    assert size_of(found["elm/a"]) == (1, 1, 2, 0)


@pytest.mark.parametrize(
    ("launch", "engine", "words"),
    [
        ({"nodes_per_elm": 2, "cpus_per_elm": 4}, {}, "nodes_per_elm=2 must divide the 1 processes"),
        ({"nodes_per_elm": 2, "cpus_per_elm": 3}, {"num_processes": 2}, "must divide the 3 cores"),
        ({"nodes_per_elm": 2, "cpus_per_elm": 4, "gpus_per_elm": 3}, {}, "must divide the 3 GPUs"),
        (
            {"groups": {"wide": {"elms": ["b"], "nodes_per_elm": 3, "num_processes": 4}}},
            {},
            "launch.groups.wide.nodes_per_elm=3 must divide the 4 processes",
        ),
    ],
)
def test_sizes_that_nodes_cannot_share_out_are_refused(launch, engine, words):
    with pytest.raises(ConfigError) as caught:
        configuration(launch, engine=engine)
    assert any(words in problem for problem in caught.value.problems)


def test_processes_that_share_out_layers_see_the_same_sequences():
    engine = {"name": "megatron", "tensor_parallel": 4}
    launch = {"gpus_per_elm": 8, "cpus_per_elm": 8}
    train = {"batch_tokens": 3 * 64 * 6, "sequence_length": 64}
    config = configuration(launch, engine=engine, train=train, model={"num_layers": 4, "num_heads": 4})
    # 6 sequences for two groups of four processes; six processes would divide them, but not into groups of four.
    assert steps(config, Machine(num_cpus=8, num_gpus=8))["elm/a"].num_processes == 8


@pytest.mark.parametrize(
    ("engine", "words"),
    [
        ({"name": "megatron", "tensor_parallel": 4}, "engine.tensor_parallel=4 needs"),
        ({"expert_parallel": 4, "num_processes": 4}, "engine.expert_parallel=4 needs"),
    ],
)
def test_processes_of_the_whole_machine_that_do_not_divide_are_refused(engine, words):
    sparse = {"ffn": {"layer": "demix"}} if "expert_parallel" in engine else {}
    train = {"batch_tokens": 64 * 6, "sequence_length": 64} if sparse else RECIPE
    launch = {"executor": "slurm", "gpus_per_elm": 4, "cpus_per_elm": 4, "slurm": {"gpus_per_node": 2}}
    config = configuration(launch, engine=engine, train=train, model={"num_layers": 4, "num_heads": 4}, **sparse)
    with pytest.raises(ConfigError, match=words):
        steps(config)


def test_one_machine_refuses_what_is_still_to_be_trained_on_two(tmp_path):
    config = configuration({"nodes_per_elm": 2, "cpus_per_elm": 2}, engine={"num_processes": 2})
    context = Context(config=config, forest_dir=tmp_path, updates=divide_updates(config.train, 3), domains=["a"])
    elm = steps(config, Machine(num_cpus=2))["elm/a"]
    with pytest.raises(ConfigError, match=r"elm/a runs on 2 nodes.*launch=local has this machine alone"):
        check_nodes([elm], context)
    (Path(tmp_path) / "runs/elm/a").mkdir(parents=True)
    (Path(tmp_path) / "runs/elm/a/result.json").write_text("{}")
    check_nodes([elm], context)
