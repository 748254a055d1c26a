"""Who shares out experts in a plan."""

import pytest

from btm.budget import model_size
from btm.config_parse import parse_config
from btm.errors import ConfigError
from btm.plan import plan_add, plan_run
from btm.plan_steps import Machine, PlanInput
from btm.plan_table import plan_tables


def given(num_processes: int, expert_parallel: int, batch_tokens: int, engine: str = "torch", **keys: int) -> PlanInput:
    config = parse_config(
        {
            "ffn": {"layer": "demix"},
            "baselines": {"dense": True},
            "train": {"sequence_length": 128, "batch_tokens": batch_tokens},
            "launch": {"cpus_per_elm": num_processes},
            "engine": {"name": engine, "num_processes": num_processes, "expert_parallel": expert_parallel} | keys,
        }
    )
    size = model_size(config.model, config.tokenizer.vocab_size)
    return PlanInput(config=config, machine=Machine(num_cpus=8), size=size, domains=["ants", "bees"])


@pytest.mark.parametrize("engine", ["torch", "deepspeed"])
def test_the_sparse_model_gets_a_multiple_of_the_processes_that_share_out_its_experts(engine):
    """Six sequences, four processes: three would share them, two do where experts are shared out by two."""
    asked = given(4, 2, 6 * 128, engine)
    processes = {step.name: step.num_processes for step in plan_run(asked)}
    assert (processes["sparse"], processes["dense"]) == (2, 3)
    (step,) = (step for step in plan_add(asked, "cats", num_original_domains=2) if "expert" in step.name)
    assert step.num_processes == 3


def test_processes_that_share_out_layers_count_as_one_that_shares_out_experts():
    """Six sequences, eight processes in pairs: three pairs share them, two where pairs share out experts."""
    asked = given(8, 2, 6 * 128, "megatron", tensor_parallel=2)
    steps = plan_run(asked)
    processes = {step.name: step.num_processes for step in steps}
    assert (processes["sparse"], processes["dense"]) == (4, 6)
    totals = plan_tables(steps, asked.config, asked)[1]
    assert "shared out among 4 processes, 1 times" in [str(cell) for cell in totals.columns[1].cells]


def test_sequences_that_cannot_be_shared_are_refused_with_the_remedy():
    with pytest.raises(ConfigError, match=r"make train.batch_tokens a multiple of 4 \* train.sequence_length"):
        plan_run(given(4, 4, 6 * 128))
