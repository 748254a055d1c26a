"""The plan of a domain that joins a DEMix model."""

import pytest

from btm.budget import model_size
from btm.config_parse import parse_config
from btm.plan import plan_add, plan_run
from btm.plan_steps import Machine, PlanInput, StepKind


@pytest.mark.parametrize("num_domains", [1, 2, 3, 8])
def test_a_new_domain_gets_the_share_that_each_of_the_first_ones_had(num_domains):
    names = [f"d{index}" for index in range(num_domains)]
    config = parse_config({"ffn": {"layer": "demix"}})
    size = model_size(config.model, config.tokenizer.vocab_size)
    given = PlanInput(config=config, machine=Machine(num_cpus=2), size=size, domains=names)
    (sparse,) = (step for step in plan_run(given) if step.name == "sparse")
    steps = plan_add(given, "law", num_original_domains=num_domains)
    assert [step.name for step in steps] == ["prepare/law", "branch/law", "expert/law", "grow/law", "join/law"]
    assert [list(step.needs) for step in steps] == [[], *([step.name] for step in steps[:-1])]
    (training,) = (step for step in steps if step.kind is StepKind.train)
    assert training.tokens * num_domains == sparse.tokens
    assert training.updates == sparse.updates
