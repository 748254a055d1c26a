"""Plans of models whose auxiliary routers learn after them, and which routings are scored."""

import pytest

from btm.budget import model_size
from btm.config_parse import parse_config
from btm.errors import ConfigError
from btm.plan import plan_run
from btm.plan_steps import Machine, PlanInput, StepKind
from btm.records import DomainScore, Evaluation, ModelScores
from btm.summary import relations, write_summary

LATER = {"layer": "modality", "auxiliary_tokens": 40_000}
BATCH = {"tokens": 100_000, "batch_tokens": 2048, "sequence_length": 256}


def steps_of(ffn):
    config = parse_config({"ffn": ffn, "train": BATCH, "baselines": {"dense": True}})
    size = model_size(config.model, config.tokenizer.vocab_size)
    given = PlanInput(config=config, machine=Machine(num_cpus=2), size=size, domains=["emoji"])
    return {step.name: step for step in plan_run(given)}


def test_routers_learn_after_their_model_and_before_its_causal_score():
    steps = steps_of(LATER)
    routers, sparse = steps["routers"], steps["sparse"]
    assert (routers.kind, routers.needs) == (StepKind.train, ("sparse",))
    assert routers.updates == 40_000 // 2048
    assert routers.tokens == routers.updates * 2048
    assert routers.flops / routers.tokens < 0.4 * sparse.flops / sparse.tokens, "the frozen model runs forward only"
    assert steps["score/sparse"].needs == ("routers",)
    assert steps["score/sparse/training_routing"].needs == ("sparse",)
    assert set(steps["evaluate"].needs) == {"score/sparse", "score/sparse/training_routing", "score/dense"}


@pytest.mark.parametrize(
    ("ffn", "rows"),
    [
        ({"layer": "modality"}, 2),
        ({"layer": "modality", "group_sizes": [8]}, 2),
        ({"layer": "modality", "group_sizes": [1, 1]}, 1),
        ({"layer": "modality", "group_sizes": [1, 1], "depth_fraction": 0.25}, 2),
        ({"layer": "modality", "inference": "expert_choice"}, 1),
        ({"layer": "top_k", "router": "expert_choice"}, 1),
    ],
)
def test_both_routings_are_scored_where_they_differ(ffn, rows):
    names = [name for name in steps_of(ffn) if name.startswith("score/sparse")]
    assert names == ["score/sparse", "score/sparse/training_routing"][:rows]
    assert "routers" not in steps_of(ffn)


@pytest.mark.parametrize(
    "change",
    [{"layer": "top_k"}, {"group_sizes": [1, 1]}, {"inference": "expert_choice"}, {"auxiliary_weight": 0.0}],
)
def test_routers_that_nothing_asks_are_refused(change):
    with pytest.raises(ConfigError, match="auxiliary_tokens trains auxiliary routers"):
        parse_config({"ffn": LATER | change, "train": BATCH})


def test_the_gap_between_the_routings_is_in_the_summary(tmp_path):
    def score(perplexity):
        return DomainScore(perplexity=perplexity, low=1, high=20, bits_per_byte=1, tokens=9)

    values = {"sparse": 12.0, "sparse/training_routing": 10.0, "dense": 11.0}
    models = {name: ModelScores(domains={"emoji": score(value)}) for name, value in values.items()}
    evaluation = Evaluation(domains=["emoji"], novel_domains=[], models=models, sequence_length=32)
    evaluation.save(tmp_path / "evaluation.json")
    assert write_summary(tmp_path, [])["routing_gap"]["emoji"]["all"] == pytest.approx(0.18232156)
    assert [item["holds"] for item in relations(evaluation)] == [False, True]
