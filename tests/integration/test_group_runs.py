"""`launch.groups` in a real run: one ELM on two processes and cores, the other on one, on each executor."""

import re
import shutil

import pytest

from btm.forest import Forest
from btm.records import TrainResult
from btm.requests import TrainSpec
from tests.conftest import SMOKE, run_btm, two_domains

pytestmark = pytest.mark.slow

LOSS_TOLERANCE = 2e-3
"""Nats per token after 10 updates in bf16; the trainer's own tests have the layouts in fp32 within rounding."""


@pytest.mark.parametrize("executor", ["local", pytest.param("ray", marks=pytest.mark.ray)])
def test_an_elm_on_two_processes_learns_what_it_learns_on_one(forest, corpora, tmp_path, executor):
    import torch
    from safetensors.torch import load_file

    own = tmp_path / "forest"
    shutil.copytree(forest, own)
    for name in ("code", "docs"):
        run_btm("remove", f"forest={own}", f"domain={name}", cwd=tmp_path)
    groups = "launch.groups.pair={elms: [code], num_processes: 2, cpus_per_elm: 2}"
    arguments = [*SMOKE, *two_domains(corpora), "baselines=all", f"forest={own}", f"launch={executor}", groups]
    shown = run_btm("run", *arguments, "dry_run=true", cwd=tmp_path).stdout
    assert re.search(r"elm/code +seed +2 +2 +0", shown)
    assert re.search(r"elm/docs +seed +1 +1 +0", shown)
    run_btm("run", *arguments, cwd=tmp_path)
    assert Forest.open(own).domains == ["code", "docs"]
    logs = {name: (own / f"runs/elm/{name}/log.txt").read_text() for name in ("code", "docs")}
    assert "2 x cpu" in logs["code"]
    assert "1 x cpu" in logs["docs"]
    for name in ("code", "docs"):
        now, before = (TrainResult.load(place / f"runs/elm/{name}/result.json") for place in (own, forest))
        assert TrainSpec.load(own / f"runs/elm/{name}/spec.json").sha256 == before.spec_sha256
        assert now.dev_loss[name] == pytest.approx(before.dev_loss[name], abs=LOSS_TOLERANCE)
        weights = [load_file(place / f"elms/{name}/model.safetensors") for place in (own, forest)]
        differences = [(weights[0][key].float() - weights[1][key].float()).abs().max() for key in weights[0]]
        largest = float(torch.stack(differences).max())
        assert largest == 0 if name == "docs" else largest < 0.02
