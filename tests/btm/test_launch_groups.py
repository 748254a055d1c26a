"""`launch.groups`: some ELMs on more cores, GPUs and processes than the others; what is refused, and how."""

import pytest
from rich.console import Console

from btm.budget import model_size
from btm.cli import check_overrides
from btm.config_parse import parse_config
from btm.errors import ConfigError
from btm.plan import plan_add, plan_run
from btm.plan_steps import Machine, PlanInput
from btm.plan_table import plan_tables
from btm.session import plan_input

NAMES = ("a", "b", "c")
LARGE = {"large": {"elms": ["b"], "gpus_per_elm": 8, "cpus_per_elm": 16}}


def configuration(groups, **raw):
    domains = {name: f"{name}.txt" for name in NAMES}
    return parse_config({"data": {"domains": domains}, "launch": {"gpus_per_elm": 2, "groups": groups}, **raw})


def given(config, cores=32, gpus=16):
    size = model_size(config.model, config.tokenizer.vocab_size)
    return PlanInput(config=config, machine=Machine(num_cpus=cores, num_gpus=gpus), size=size, domains=NAMES)


def shares(config):
    return {step.name: (step.num_processes, step.num_cpus, step.num_gpus) for step in plan_run(given(config))}


def test_the_elms_of_a_group_get_what_it_says_and_the_others_what_all_get():
    found = shares(configuration(LARGE, train={"batch_tokens": 8192 * 3, "sequence_length": 64}))
    assert found["elm/b"] == (8, 16, 8)
    assert found["elm/a"] == found["elm/c"] == (2, 2, 2)
    assert found["seed"] == shares(configuration({}, train={"batch_tokens": 8192 * 3, "sequence_length": 64}))["seed"]


def test_processes_alone_take_as_many_cores():
    config = configuration({}, launch={"groups": {"two": {"elms": ["c"], "num_processes": 2}}})
    assert shares(config)["elm/c"] == (2, 2, 0)
    assert shares(config)["elm/a"] == (1, 1, 0)


def test_a_domain_that_joins_later_may_be_in_a_group():
    config = configuration({"large": LARGE["large"] | {"elms": ["new"]}}, domain="new")
    config = config.model_copy(update={"train": config.train.model_copy(update={"batch_tokens": 3 * 8 * 256})})
    steps = {step.name: step for step in plan_add(given(config), "new", num_original_domains=3)}
    assert (steps["elm/new"].num_cpus, steps["elm/new"].num_gpus) == (16, 8)


def test_the_dry_run_shows_groups_and_how_many_elms_fit():
    config = configuration(LARGE, train={"batch_tokens": 8192 * 3, "sequence_length": 64})
    console = Console(record=True, width=240)
    plan = given(config)
    for table in plan_tables(plan_run(plan), config, plan):
        console.print(table)
    lines = {line.split("  ")[0].strip(): line for line in console.export_text().splitlines()}
    assert "b: each 8 processes, 16 cores, 8 GPUs" in lines["group large"]
    assert lines["ELMs at the same time"].split()[-1] == "3"
    assert lines["elm/b"].split()[2:5] == ["8", "16", "8"]


@pytest.mark.parametrize(
    ("groups", "words"),
    [
        ({"x": {"elms": ["a"]}, "y": {"elms": ["b", "a"]}}, "names 'a', which is in launch.groups.x already"),
        ({"x": {"elms": ["a", "a"]}}, "must name each ELM once, got ['a']"),
        ({"x": {"elms": []}}, "launch.groups.x.elms must name at least one ELM"),
        ({"x": {}}, "launch.groups.x.elms"),
        (
            {"x": {"elms": ["a"], "gpus_per_elm": 2, "num_processes": 3}},
            "num_processes must be at most gpus_per_elm (2)",
        ),
        (
            {"x": {"elms": ["a"], "cpus_per_elm": 1, "gpus_per_elm": 0, "num_processes": 2}},
            "number of processes (2), got 1",
        ),
        ({"x": {"elms": ["a"], "gpus": 2}}, "did you mean launch.groups.x.gpus_per_elm?"),
        ({"x": {"elms": ["a"], "cpus_per_elm": 0}}, "greater than or equal to 1"),
    ],
)
def test_contradictions_are_named(groups, words):
    with pytest.raises(ConfigError) as caught:
        configuration(groups)
    assert words in str(caught.value)


def test_unknown_elms_are_named_with_the_nearest_one():
    config = configuration({}, launch={"groups": {"x": {"elms": ["aa"]}}})
    with pytest.raises(ConfigError, match=r"names 'aa', which is no ELM of this forest; did you mean 'a'\?"):
        plan_input(config, NAMES, [])


def test_more_than_the_machine_has_is_refused():
    config = configuration({}, launch={"groups": {"x": {"elms": ["a"], "cpus_per_elm": 4096}}})
    with pytest.raises(ConfigError, match=r"asks for 4096 cores and 0 GPUs for 'a', this machine has"):
        plan_input(config, NAMES, [])


def test_keys_of_a_group_are_checked_on_the_command_line():
    assert check_overrides(["launch.groups.large.elms=[a]"]) == ["++launch.groups.large.elms=[a]"]
    with pytest.raises(ConfigError, match=r"did you mean launch\.groups\.large\.gpus_per_elm\?"):
        check_overrides(["launch.groups.large.gpu_per_elm=2"])


def test_processes_of_a_group_are_a_multiple_of_those_that_share_out_a_layer():
    engine = {"name": "megatron", "num_processes": 2, "tensor_parallel": 2}
    launch = {"cpus_per_elm": 2, "groups": {"x": {"elms": ["a"], "cpus_per_elm": 3, "num_processes": 3}}}
    with pytest.raises(ConfigError, match=r"launch\.groups\.x\.num_processes must be a multiple of .* \(2\), got 3"):
        configuration({}, launch=launch, engine=engine)
