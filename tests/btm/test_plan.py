"""The plan: pure, complete, and with equal budgets for what is compared."""

import pytest

from btm.budget import divide_updates, model_size
from btm.config_parse import parse_config
from btm.config_train import BranchSource
from btm.plan import only_available, plan_add, plan_evaluation, plan_run
from btm.plan_steps import Machine, PlanInput, StepKind
from btm.plan_table import makespan_seconds, plan_tables


def given(domains=("a", "b", "c"), novel=("n",), cores=2, **raw):
    config = parse_config({"baselines": {"dense": True, "random_split": True}, **raw})
    size = model_size(config.model, config.tokenizer.vocab_size)
    return PlanInput(config=config, machine=Machine(num_cpus=cores), size=size, domains=domains, novel=novel)


def test_a_plan_is_pure():
    assert plan_run(given()) == plan_run(given())


def test_every_need_is_a_step_that_comes_before():
    seen = set()
    for step in plan_run(given()):
        assert set(step.needs) <= seen, step
        seen.add(step.name)


@pytest.mark.parametrize("num_domains", [1, 2, 3, 5, 7, 8, 32])
@pytest.mark.parametrize("fraction", [0.0, 0.3, 0.5, 1.0])
def test_b1_equal_tokens_and_flops_for_forest_dense_and_random_split(num_domains, fraction):
    """B1: the ledger of seed + ELMs equals that of the dense model and of the random-split forest."""
    names = [f"d{index}" for index in range(num_domains)]
    steps = plan_run(given(names, train={"seed_fraction": fraction}))
    for quantity in ("tokens", "flops"):
        total = {
            kind: sum(getattr(step, quantity) for step in steps if step.name.startswith(kind))
            for kind in ("seed", "elm/", "dense", "random/")
        }
        assert total["elm/"] == pytest.approx(total["dense"], rel=1e-12)
        assert total["elm/"] == pytest.approx(total["random/"], rel=1e-12)


def test_elms_take_an_equal_share_of_the_batch():
    config = parse_config({"train": {"tokens": 3_276_800, "batch_tokens": 8192, "sequence_length": 256}})
    updates = divide_updates(config.train, 8)
    assert (updates.total, updates.seed, updates.elm) == (400, 200, 200)
    assert (updates.batch_sequences, updates.elm_batch_sequences) == (32, 4)
    uneven = divide_updates(config.train, 5)
    assert uneven.batch_sequences == 5 * uneven.elm_batch_sequences == 30


def test_the_size_formula_equals_the_real_model():
    from btm.model.causal_lm import build_model

    config = parse_config({"model": {"num_layers": 3, "num_kv_heads": 1, "hidden_size": 128, "num_heads": 2}})
    for tied in (True, False):
        model_config = config.model.model_copy(update={"tie_embeddings": tied})
        model = build_model(model_config, vocab_size=300, eos_id=0, seed=0)
        assert sum(p.numel() for p in model.parameters()) == model_size(model_config, 300).num_parameters


def test_only_elm_branches_from_a_mixture_need_the_others_scores():
    raw = {"branch": {"from": "posterior", "optimizer": "reset"}}
    steps = plan_add(given(**raw), "new", num_original_domains=3)
    kinds = [step.kind for step in steps]
    assert kinds.count(StepKind.score) == 3
    assert steps[-2].needs == ("branch/new",)
    assert [s.kind for s in plan_add(given(), "new", num_original_domains=3)] == ["prepare", "train", "join"]
    assert given(**raw).config.branch.source is BranchSource.posterior


def test_the_later_elm_costs_what_the_first_ones_cost():
    first = next(step for step in plan_run(given()) if step.name == "elm/a")
    later = next(step for step in plan_add(given(), "new", num_original_domains=3) if step.name == "elm/new")
    assert (first.tokens, first.flops, first.updates) == (later.tokens, later.flops, later.updates)


def test_evaluation_alone_needs_nothing_that_is_finished():
    steps = only_available(plan_evaluation(given()), ["seed", "dense"])
    names = {step.name for step in steps}
    assert all(set(step.needs) <= names for step in steps)


def test_the_plan_prints_and_its_time_shrinks_with_cores():
    steps = plan_run(given())
    assert len(plan_tables(steps, given().config, given())) == 2
    assert makespan_seconds(steps, 8) < makespan_seconds(steps, 2)
