"""The model of a sparse run while domains join and leave: what counts is whole, whenever a command is killed."""

import os
import shutil

import pytest

from btm.errors import ForestError
from btm.files import read_json, write_json
from btm.records import Ledger, TrainResult
from btm.sparse_models import FIRST_MODEL, DomainExperts, SparseModels


class Killed(BaseException):
    pass


NEW = DomainExperts(domain="cats", weights="later/cats", ancestors=["bees"], ledger=Ledger(tokens=7))


def fake_model(directory, domains):
    directory.mkdir(parents=True)
    write_json(directory / "config.json", {"btm": {"domains": domains}})


@pytest.fixture
def forest(tmp_path):
    """What `btm run ffn=demix` leaves, without weights."""
    root = tmp_path / "forest"
    fake_model(root / FIRST_MODEL, ["ants", "bees"])
    (root / "runs/sparse/checkpoints").mkdir()
    result = TrainResult(
        name="sparse", spec_sha256="first", model_dir="", ledger=Ledger(), updates=1, skipped_updates=0,
        final_loss=1.0, num_parameters=1,
    )  # fmt: skip
    result.save(root / "runs/sparse/result.json")
    return root


def publish(forest, experts):
    models = SparseModels.open(forest)
    if not models.directory_for(experts).exists():
        fake_model(models.directory_for(experts), [one.domain for one in experts])
    models.publish(experts)


def check_whole(forest) -> list[str]:
    """The model that counts is there and has exactly the experts that are said to be in it."""
    models = SparseModels.open(forest)
    assert read_json(models.directory / "config.json")["btm"]["domains"] == models.domains
    return models.domains


def test_a_run_is_opened_as_it_was_left(forest):
    models = SparseModels.open(forest)
    assert (models.domains, models.directory) == (["ants", "bees"], forest / FIRST_MODEL)
    assert models.experts("bees").weights == "first/bees"
    assert not (forest / "experts.json").exists()


def test_a_domain_joins_and_the_first_model_stays(forest):
    publish(forest, SparseModels.open(forest).with_domain(NEW))
    assert check_whole(forest) == ["ants", "bees", "cats"]
    assert (forest / FIRST_MODEL).is_dir()
    assert [one.weights for one in SparseModels.open(forest).manifest.experts[:2]] == ["first/ants", "first/bees"]


def test_what_a_killed_writer_left_is_deleted(forest):
    publish(forest, SparseModels.open(forest).with_domain(NEW))
    for name in (".tmp-experts.json-x", "experts/.tmp-0123"):
        (forest / name).write_text("{")
    SparseModels.open(forest).clean()
    assert not list(forest.rglob(".tmp-*"))


def test_everything_of_a_domain_goes_with_it(forest):
    publish(forest, SparseModels.open(forest).with_domain(NEW))
    for folder in ("runs/expert", "runs/branch", "runs/grow", "scores/sparse"):
        for domain in ("cats", "bees"):
            (forest / folder / domain).mkdir(parents=True)
    publish(forest, SparseModels.open(forest).without_domain("cats"))
    assert [path.name for path in (forest / "runs/expert").iterdir()] == ["bees"]
    assert (forest / FIRST_MODEL).is_dir()
    assert (forest / "runs/sparse/checkpoints").is_dir()
    publish(forest, SparseModels.open(forest).without_domain("bees"))
    assert not (forest / FIRST_MODEL).exists()
    assert not (forest / "runs/sparse/checkpoints").exists()
    assert not list((forest / "scores/sparse").iterdir())
    assert [path.name for path in (forest / "experts").iterdir()] == [SparseModels.open(forest).directory.name]
    assert check_whole(forest) == ["ants"]


@pytest.mark.parametrize("joins", [True, False])
def test_killed_at_any_change_of_the_directory_the_old_or_the_new_model_counts(forest, monkeypatch, joins):
    """Each call that changes the directory is the last one once; the same command then ends as if nothing had been."""
    publish(forest, SparseModels.open(forest).with_domain(NEW))
    (forest / "runs/expert/cats").mkdir(parents=True)
    fifth = NEW.model_copy(update={"domain": "dogs"})
    present = SparseModels.open(forest)
    target = present.with_domain(fifth) if joins else present.without_domain("bees")
    outcomes = {tuple(present.domains), tuple(one.domain for one in target)}
    start, seen = forest.with_name("start"), set()
    shutil.copytree(forest, start)
    for limit in range(100):
        shutil.rmtree(forest)
        shutil.copytree(start, forest)
        with monkeypatch.context() as patch:
            calls = [0]
            for module, name in ((os, "replace"), (os, "rename"), (os, "unlink"), (shutil, "rmtree")):
                patch.setattr(module, name, _counted(getattr(module, name), calls, limit))
            try:
                publish(forest, target)
                is_whole = True
            except Killed:
                is_whole = False
        now = tuple(check_whole(forest))
        assert now in outcomes
        seen.add(now)
        if now == tuple(one.domain for one in target):
            SparseModels.open(forest).clean()
            assert SparseModels.open(forest).manifest.leaving == []
            assert (forest / FIRST_MODEL).exists() is joins
            assert len(list((forest / "experts").iterdir())) == 1
        if is_whole:
            break
    assert is_whole
    assert limit > 2
    assert seen == outcomes


def _counted(function, calls, limit):
    def call(*args, **kwargs):
        if calls[0] >= limit:
            raise Killed
        calls[0] += 1
        return function(*args, **kwargs)

    return call


def test_unknown_present_and_last_domains_are_refused(forest):
    models = SparseModels.open(forest)
    with pytest.raises(ForestError, match="no experts of domain 'cats'; it has those of"):
        models.without_domain("cats")
    with pytest.raises(ForestError, match="already has experts of domain 'ants'; remove them first"):
        models.with_domain(NEW.model_copy(update={"domain": "ants"}))
    publish(forest, models.without_domain("ants"))
    with pytest.raises(ForestError, match="the last one of the model"):
        SparseModels.open(forest).without_domain("bees")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "../other"}, "model must be a directory under experts/"),
        ({"model": "experts/0123456789abcdef"}, "is missing"),
        ({"experts": []}, "at least one domain"),
        ({"leaving": ["../../home"]}, "cannot be a name"),
        ({"schema_version": 2}, "update the program"),
    ],
)
def test_a_damaged_or_hostile_file_is_refused(forest, change, message):
    publish(forest, SparseModels.open(forest).with_domain(NEW))
    write_json(forest / "experts.json", read_json(forest / "experts.json") | change)
    with pytest.raises(ForestError, match=message):
        SparseModels.open(forest)


def test_before_the_training_has_ended_there_is_no_model(forest):
    (forest / "runs/sparse/result.json").unlink()
    with pytest.raises(ForestError, match="no trained sparse model yet; `btm run"):
        SparseModels.open(forest)
