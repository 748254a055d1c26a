"""Which weights an ELM starts from, and which parents are recorded for it."""

import shutil

import pytest

from btm.config_parse import parse_config
from btm.files import read_json
from btm.forest import Forest
from btm.plan import plan_run
from btm.plan_steps import StepKind
from btm.records import Parent
from btm.requests import TrainSpec
from btm.session import make_context, plan_input
from btm.step_specs import build_spec
from tests.conftest import run_btm


def test_a_branch_left_by_a_removed_elm_is_no_parent_of_its_successor(forest, corpora, tmp_path):
    folder = tmp_path / "forest"
    shutil.copytree(forest, folder)
    arguments = [f"forest={folder}", "domain=mail"]
    text = f"data.path={corpora / 'mail.jsonl'}"
    run_btm("add", *arguments, text, "branch=uniform", cwd=tmp_path)
    assert [parent.name for parent in Forest.open(folder).elm("mail").parents] == ["code", "docs"]
    run_btm("remove", *arguments, cwd=tmp_path)
    assert (folder / "runs/branch/mail/model.json").is_file(), "nothing is left over: this test shows nothing"
    run_btm("add", *arguments, text, "branch=seed", cwd=tmp_path)
    successor = Forest.open(folder).elm("mail")
    assert successor.parents == [Parent(name="seed", weight=1.0)]
    assert successor.ancestors == []


@pytest.mark.parametrize("source", ["posterior", "nearest", "uniform"])
def test_the_first_round_branches_from_the_seed_whatever_later_elms_do(forest, source):
    raw = read_json(forest / "config.json")
    raw["branch"] = {"from": source, "optimizer": "reset"}
    config = parse_config(raw | {"forest": str(forest)})
    context = make_context(config, ["code", "docs"], ["headers"])
    steps = plan_run(plan_input(config, context.domains, context.novel))
    trainings = [step for step in steps if step.kind is StepKind.train and step.name.startswith("elm/")]
    assert [step.name for step in trainings] == ["elm/code", "elm/docs"]
    for step in trainings:
        spec = build_spec(step, context)
        assert isinstance(spec, TrainSpec)
        assert (spec.start.kind, spec.start.path) == ("weights", str(forest / "seed"))
