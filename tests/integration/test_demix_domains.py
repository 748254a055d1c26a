"""`btm add` and `btm remove` on a DEMix model: a domain joins and another leaves, and nothing else changes by a bit."""

import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from btm.config_parse import parse_config
from btm.errors import ConfigError, ForestError
from btm.evaluate.score import load_scores, score
from btm.files import read_json
from btm.forest import Forest
from btm.records import Evaluation, TrainResult
from btm.requests import ScoreSpec
from btm.sparse_models import FIRST_MODEL, SparseModels
from btm.verbs import add, generate, remove
from tests.conftest import run_btm

pytestmark = pytest.mark.slow  # forty seconds; `make test-slow`


@pytest.fixture(scope="module")
def grown(sparse_run, corpora, tmp_path_factory):
    """A DEMix model that a domain has joined; the command was killed in its training and typed again."""
    folder = tmp_path_factory.mktemp("grown")
    shutil.copytree(sparse_run("demix")[0], folder / "forest")
    arguments = ("add", f"forest={folder / 'forest'}", "domain=mail", f"data.path={corpora / 'mail.jsonl'}")
    checkpoints = folder / "forest/runs/expert/mail/checkpoints"
    killed = subprocess.Popen(
        [sys.executable, "-m", "btm.cli", *arguments],
        cwd=folder, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while not list(checkpoints.glob("step-*")) and killed.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    os.killpg(killed.pid, signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL
    between = SparseModels.open(folder / "forest")
    done = run_btm(*arguments, cwd=folder)
    return folder / "forest", between, done.stdout


@pytest.fixture(scope="module")
def shrunk(grown, tmp_path_factory):
    """The same without one of the first domains."""
    forest = tmp_path_factory.mktemp("shrunk") / "forest"
    shutil.copytree(grown[0], forest)
    printed = run_btm("remove", f"forest={forest}", "domain=docs", cwd=forest.parent).stdout
    run_btm("evaluate", f"forest={forest}", cwd=forest.parent)
    return forest, printed


def configuration(forest, **changes):
    return parse_config(read_json(forest / "config.json") | {"forest": str(forest)} | changes)


def expert_names(tensors, number):
    return {name for name in tensors if f".experts.experts.{number}." in name}


def test_old_domains_keep_their_perplexity_to_the_last_bit(sparse_run, grown):
    forest, between, printed = grown
    assert between.domains == ["code", "docs"]
    before = Evaluation.load(sparse_run("demix")[0] / "evaluation.json")
    after = Evaluation.load(forest / "evaluation.json")
    assert (after.domains, after.novel_domains) == (["code", "docs", "mail"], ["headers"])
    for domain in ("code", "docs"):
        assert after.models["sparse"].domains[domain] == before.models["sparse"].domains[domain]
    assert after.models["dense"].domains["code"] == before.models["dense"].domains["code"]
    assert after.models["sparse"].ledger.tokens == before.models["sparse"].ledger.tokens + 20_480
    assert "experts of mail joined" in printed


@pytest.mark.parametrize("domain", ["code", "docs"])
def test_the_new_model_scores_old_domains_as_the_old_one_did(sparse_run, grown, tmp_path, domain):
    """Scores of old domains are kept, not computed again; computed again by the new model they are the same bits."""
    forest, old = grown[0], sparse_run("demix")[0]
    spec = ScoreSpec.load(forest / f"runs/score/sparse/{domain}/spec.json")
    assert spec.model_dir == str(SparseModels.open(forest).directory)
    score(spec.model_copy(update={"output_dir": str(tmp_path)}))
    for key in ("test-code", "test-docs", "test-headers"):
        again, first = load_scores(tmp_path, key), load_scores(old / f"scores/sparse/{domain}", key)
        assert np.array_equal(again.logp.view(np.uint32), first.logp.view(np.uint32))


def test_frozen_tensors_are_the_same_bits_and_the_new_experts_have_learnt(sparse_run, grown):
    forest = grown[0]
    first = load_file(sparse_run("demix")[0] / FIRST_MODEL / "model.safetensors")
    now = load_file(SparseModels.open(forest).directory / "model.safetensors")
    new = expert_names(now, 2)
    assert now.keys() - first.keys() == new
    for name, tensor in first.items():
        assert tensor.dtype == now[name].dtype
        assert torch.equal(tensor.view(torch.uint8), now[name].view(torch.uint8)), name
    like = SparseModels.open(forest).experts("mail").ancestors[0]
    parent = ["code", "docs"].index(like)
    moved = [
        name for name in new if not torch.equal(now[name], first[name.replace("experts.2.", f"experts.{parent}.")])
    ]
    assert set(moved) == new
    trained = TrainResult.load(forest / "runs/expert/mail/result.json")
    assert trained.realised_tokens == {"mail": trained.ledger.tokens}
    rows = (forest / "runs/expert/mail/metrics.jsonl").read_text()
    assert "eval/mail/loss" in rows


def test_the_new_domain_is_read_better_by_its_experts(grown):
    models = Evaluation.load(grown[0] / "evaluation.json").models
    assert models["sparse"].domains["mail"].perplexity < models["dense"].domains["mail"].perplexity


def test_a_domain_that_leaves_is_read_worse_and_the_others_as_before(grown, shrunk):
    before = Evaluation.load(grown[0] / "evaluation.json")
    after = Evaluation.load(shrunk[0] / "evaluation.json")
    assert (after.domains, after.novel_domains) == (["code", "mail"], ["docs", "headers"])
    for domain in ("code", "mail"):
        assert after.models["sparse"].domains[domain] == before.models["sparse"].domains[domain]
    assert "docs" not in after.models["sparse"].domains
    for row in ("ensemble/uniform", "ensemble/cached"):
        assert after.models[row].domains["docs"].perplexity > before.models[row].domains["docs"].perplexity
        assert after.models[row].domains["docs"].perplexity > before.models["sparse"].domains["docs"].perplexity


def test_the_weights_of_a_domain_that_left_are_nowhere(grown, shrunk):
    forest, printed = shrunk
    assert "removed the experts of docs" in printed
    then = load_file(SparseModels.open(grown[0]).directory / "model.safetensors")
    dtype = then[next(iter(expert_names(then, 1)))].dtype
    gone = {then[name].float().numpy().tobytes() for name in expert_names(then, 1)}

    def holds_some(forest):
        # Checkpoints hold the weights before they were rounded.
        return [
            path.relative_to(forest).as_posix()
            for path in forest.rglob("*.safetensors")
            if any(tensor.to(dtype).float().numpy().tobytes() in gone for tensor in load_file(path).values())
        ]

    found = holds_some(grown[0])
    assert f"{FIRST_MODEL}/model.safetensors" in found
    assert any("checkpoints" in path for path in found)
    assert holds_some(forest) == []
    now = load_file(SparseModels.open(forest).directory / "model.safetensors")
    for name in expert_names(then, 2):
        assert torch.equal(then[name], now[name.replace("experts.2.", "experts.1.")])


def test_generate_takes_the_model_of_now(shrunk):
    forest = shrunk[0]
    for model in ("sparse/mail", "ensemble"):
        config = configuration(forest, generate={"model": model, "prompt": "import", "max_new_tokens": 3})
        assert generate.continuation(Forest.open(forest), config).startswith("import")
    config = configuration(forest, generate={"model": "sparse/docs", "prompt": "import"})
    with pytest.raises(ConfigError, match="domain 'docs' is not among those of the model: code, mail"):
        generate.continuation(Forest.open(forest), config)


def test_domains_that_are_there_or_not_there_are_refused(grown, shrunk, corpora):
    mail = {"path": str(corpora / "mail.jsonl")}
    data = configuration(grown[0]).data.model_dump(mode="json")
    with pytest.raises(ForestError, match="already has experts of domain 'mail'; remove them first"):
        add.main(configuration(grown[0], domain="mail", data=data | mail))
    with pytest.raises(ConfigError, match=r"domain=tax needs data\.path="):
        add.main(configuration(grown[0], domain="tax"))
    with pytest.raises(ForestError, match=r"no experts of domain 'docs'; it has those of \['code', 'mail'\]"):
        remove.main(configuration(shrunk[0], domain="docs"))


def test_dry_runs_change_nothing(grown, corpora, capsys):
    forest = grown[0]
    before = (forest / "experts.json").read_bytes()
    data = configuration(forest).data.model_dump(mode="json") | {"path": str(corpora / "headers.jsonl")}
    add.main(configuration(forest, domain="headers", dry_run=True, data=data))
    remove.main(configuration(forest, domain="code", dry_run=True))
    printed = capsys.readouterr().out
    assert "expert/headers" in printed
    assert "would remove the experts of code" in printed
    assert (forest / "experts.json").read_bytes() == before
