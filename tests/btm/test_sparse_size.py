"""What the plan says of a sparse model's size: equal to the model that is built, experts and routers included."""

import pytest

from btm.budget import model_size, sparse_size
from btm.config_model import Dtype
from btm.config_parse import parse_config
from btm.plan import plan_add, plan_run
from btm.plan_steps import Machine, PlanInput
from btm.plan_table import plan_tables

VOCABULARY, DOMAINS = 300, ("a", "b", "c")
MODEL = {"num_layers": 3, "hidden_size": 32, "num_heads": 2}
LAYERS = [
    {"layer": "top_k"},
    {"layer": "top_k", "num_experts": 5, "experts_per_token": 3, "shared_hidden_width": 16, "layers": "every_2"},
    {"layer": "top_k", "router": "switch", "hidden_width": 24},
    {"layer": "top_k", "router": "expert_choice", "capacity_factor": 1.5},
    {"layer": "top_k", "router": "hash", "layers": [2]},
    {"layer": "demix"},
    {"layer": "base"},
    {"layer": "base", "placement": "inserted", "num_sublayers": 2, "layers": "spread_1"},
    {"layer": "modality", "group_sizes": [3, 2], "modality_starts": [200]},
    {"layer": "modality", "group_sizes": [2, 2], "modality_starts": [200], "depth_fraction": 0.25},
]


@pytest.mark.parametrize("ffn", LAYERS, ids=lambda ffn: "-".join(str(value) for value in ffn.values()))
def test_the_size_formula_equals_the_real_sparse_model(ffn):
    from btm.model.causal_lm import build_model, flops_per_token
    from btm.model.expert_block import expert_modules
    from btm.model.sparse_lm import add_experts

    config = parse_config({"model": MODEL, "ffn": ffn})
    model = build_model(config.model, vocab_size=VOCABULARY, eos_id=0, seed=0)
    add_experts(model, config.ffn, DOMAINS, seed=0)
    size = sparse_size(model_size(config.model, VOCABULARY), config.ffn, len(DOMAINS))
    assert sum(parameter.numel() for parameter in model.parameters()) == size.num_parameters
    own = sum(parameter.numel() for module in expert_modules(model) for parameter in module.experts.parameters())
    assert own == size.num_expert_parameters
    assert flops_per_token(model, 16) == pytest.approx(size.flops_per_token(16), rel=1e-9)


def given(domains=DOMAINS, **raw):
    config = parse_config({"model": MODEL, "baselines": {"dense": True}, **raw})
    size = model_size(config.model, VOCABULARY)
    return PlanInput(config=config, machine=Machine(num_cpus=2), size=size, domains=domains)


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_a_plan_counts_weights_and_optimizer_state_of_all_experts(dtype):
    plan = given(ffn={"layer": "top_k", "num_experts": 16}, engine={"dtype": dtype})
    steps = {step.name: step for step in plan_run(plan)}
    size = plan.size_of("sparse")
    assert size.num_parameters > 3 * plan.size.num_parameters
    keep, stored = plan.config.train.keep_checkpoints, {"bf16": 2, "fp32": 4}[dtype]
    assert steps["sparse"].disk_bytes == (12 * keep + stored) * size.num_parameters
    assert steps["dense"].disk_bytes == (12 * keep + stored) * plan.size.num_parameters
    assert steps["sparse"].flops == pytest.approx(steps["dense"].flops, rel=0.05)
    per_weight = {"bf16": 18, "fp32": 16}[dtype]
    assert size.training_bytes(Dtype(dtype)) == per_weight * size.num_parameters
    quarter = size.num_parameters - size.num_expert_parameters * 3 // 4
    assert size.training_bytes(Dtype(dtype), expert_parallel=4) == per_weight * quarter


def test_a_domain_that_joins_costs_one_domain_and_the_model_grows_by_its_experts():
    plan = given(ffn={"layer": "demix"})
    steps = {step.name: step for step in plan_add(plan, "d", num_original_domains=3)}
    expert = 3 * 3 * plan.size.hidden_size * plan.size.intermediate_size
    assert steps["branch/d"].disk_bytes == 2 * plan.size.num_parameters
    assert steps["grow/d"].disk_bytes == 2 * (plan.size.num_parameters + 3 * expert)


def test_the_dry_run_says_how_much_memory_the_largest_training_holds():
    from rich.console import Console

    plan = given(ffn={"layer": "top_k", "num_experts": 16})
    console = Console(record=True, width=200)
    for table in plan_tables(plan_run(plan), plan.config, plan):
        console.print(table)
    text = console.export_text()
    assert "memory of the largest training" in text
    assert "a token meets" in text
