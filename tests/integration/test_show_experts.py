"""`btm list` and `btm inspect` on a run that trained one sparse model, and its directory against the plan."""

import json
import shutil

import pytest

from btm.config_parse import parse_config
from btm.errors import ConfigError, ForestError
from btm.files import read_json, sha256_of_file, write_json
from btm.plan import plan_run
from btm.records import Ledger, TrainResult
from btm.session import domain_groups, plan_input
from btm.sparse_models import DomainExperts, SparseModels
from btm.verbs import add, inspect, list

SIZE_FACTOR = 1.15
"""A directory may hold this many times what the plan says: JSON, file headers, the tokenizer."""


def configuration(forest, **changes):
    return parse_config(read_json(forest / "config.json") | {"forest": str(forest)} | changes)


def json_of(verb, forest, capsys, **changes):
    verb.main(configuration(forest, json=True, **changes))
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("kind", ["demix", "top_k"])
def test_the_plan_says_how_large_a_sparse_training_becomes(sparse_run, kind):
    forest = sparse_run(kind)[0]
    config = configuration(forest)
    domains, novel, later = domain_groups(config)
    steps = {step.name: step for step in plan_run(plan_input(config, domains, [*novel, *later]))}
    for name in ("sparse", "dense"):
        files = [path for path in (forest / "runs" / name).rglob("*") if path.is_file()]
        found = sum(path.stat().st_size for path in files)
        assert steps[name].disk_bytes / SIZE_FACTOR < found < steps[name].disk_bytes * SIZE_FACTOR, name
        trained = TrainResult.load(forest / "runs" / name / "result.json")
        assert trained.ledger.flops == pytest.approx(steps[name].flops, rel=0.05)


def test_list_shows_the_domains_of_a_demix_model(sparse_run, capsys):
    forest = sparse_run("demix")[0]
    found = json_of(list, forest, capsys)
    trained = TrainResult.load(forest / "runs/sparse/result.json")
    assert found["num_parameters"] == trained.num_parameters
    assert found["tokens"] == trained.ledger.tokens
    assert [row["domain"] for row in found["domains"]] == ["code", "docs"]
    assert [row["tokens"] for row in found["domains"]] == [trained.realised_tokens[name] for name in ("code", "docs")]
    assert [row["dev_loss"] for row in found["domains"]] == [trained.dev_loss[name] for name in ("code", "docs")]
    dense = TrainResult.load(forest / "runs/dense/result.json").num_parameters
    assert {row["num_parameters"] for row in found["domains"]} == {trained.num_parameters - dense}
    list.main(configuration(forest))
    printed = capsys.readouterr().out
    assert all(words in printed for words in ("code", "docs", "the dense network", "shared", "runs/sparse/model"))


def test_a_domain_that_joined_shows_its_ancestors_and_its_cost(sparse_run, tmp_path, capsys):
    forest = tmp_path / "forest"
    shutil.copytree(sparse_run("demix")[0], forest)
    later = DomainExperts(
        domain="docs", weights="x/docs", ancestors=["code"], ledger=Ledger(tokens=7, flops=3e9, seconds=2)
    )
    models = SparseModels.open(forest)
    shutil.copytree(models.directory, models.directory_for([models.manifest.experts[0], later]))
    models.publish([models.manifest.experts[0], later])
    first, second = json_of(list, forest, capsys)["domains"]
    assert (first["ledger"], second["ledger"]) == (None, {"tokens": 7, "flops": 3e9, "seconds": 2})
    assert (second["ancestors"], second["tokens"], second["dev_loss"]) == (["code"], 7, None)
    inspect.main(configuration(forest, domain="docs"))
    printed = capsys.readouterr().out
    assert all(words in printed for words in ("code", "3.00G", "2.0 s", "experts/"))


def test_inspect_shows_one_domain_and_the_files_of_the_model(sparse_run, capsys):
    forest = sparse_run("demix")[0]
    found = json_of(inspect, forest, capsys, domain="docs")
    assert (found["domain"], found["id"]) == ("docs", 1)
    assert found["files"]["model.safetensors"] == sha256_of_file(forest / "runs/sparse/model/model.safetensors")
    with pytest.raises(ForestError, match=r"no experts of domain 'law'; it has those of \['code', 'docs'\]"):
        inspect.main(configuration(forest, domain="law"))


def test_a_model_that_has_other_experts_than_said_is_noticed(sparse_run, tmp_path):
    forest = tmp_path / "forest"
    shutil.copytree(sparse_run("demix")[0], forest)
    path = forest / "runs/sparse/model/config.json"
    config = read_json(path)
    config["btm"]["domains"].append("law")
    write_json(path, config)
    with pytest.raises(ForestError, match=r"has experts number \[0, 1\], but there are 3 domains"):
        list.main(configuration(forest))


def test_other_sparse_runs_say_that_their_experts_have_no_domain(sparse_run, capsys):
    forest = sparse_run("top_k")[0]
    list.main(configuration(forest))
    printed = " ".join(capsys.readouterr().out.split())
    assert "experts of ffn=top_k belong to no domain" in printed
    assert json_of(list, forest, capsys)["domains"] == []
    with pytest.raises(ConfigError, match="holds one model with ffn=top_k"):
        inspect.main(configuration(forest, domain="code"))


def test_another_arithmetic_on_an_add_is_refused_before_anything_is_trained(sparse_run, corpora):
    forest = sparse_run("demix")[0]
    stored = read_json(forest / "config.json")
    data = stored["data"] | {"path": str(corpora / "mail.jsonl")}
    with pytest.raises(ConfigError, match=r"engine\.dtype must be bf16, in which the model .* is stored.*got fp32"):
        add.main(configuration(forest, domain="mail", data=data, engine=stored["engine"] | {"dtype": "fp32"}))
    assert not (forest / "runs/expert").exists()
