"""What users of other tools stumbled over, by the thread that reports it; only what no other test shows already."""

import json
import shutil

import numpy as np
from safetensors.numpy import save_file

from btm.forest import Forest
from btm.records import Evaluation, TrainResult
from tests.conftest import SMOKE, run_btm, two_domains

FAKE_KEY = "0123456789abcdef" * 2 + "fedcba98"


def test_megatron_lm_5844_an_imported_model_arrives_with_every_tensor(forest, tmp_path):
    """NVIDIA/Megatron-LM#5844: a converter dropped all weights of the experts and reported success."""
    own, guest = tmp_path / "forest", tmp_path / "guest"
    shutil.copytree(forest, own)
    shutil.copytree(forest / "elms/docs", guest)
    run_btm("add", f"forest={own}", "domain=guest", f"model.path={guest}", cwd=tmp_path)
    assert (own / "elms/guest/model.safetensors").read_bytes() == (guest / "model.safetensors").read_bytes()
    assert Forest.open(own).damages() == []


def test_megatron_lm_5844_a_model_that_lacks_a_tensor_does_not_join(forest, tmp_path):
    """NVIDIA/Megatron-LM#5844: what is missing is named, and nothing joins."""
    guest = tmp_path / "guest"
    shutil.copytree(forest / "elms/docs", guest)
    header = (guest / "model.safetensors").read_bytes()
    names = sorted(json.loads(header[8 : 8 + int.from_bytes(header[:8], "little")]).keys() - {"__metadata__"})
    zeros = {name: np.zeros((2, 2), np.float32) for name in names if "layers.1" not in name}
    save_file(zeros, guest / "model.safetensors", {"format": "pt"})
    done = run_btm("add", f"forest={forest}", "domain=guest", f"model.path={guest}", cwd=tmp_path, check=False)
    assert done.returncode == 1
    assert "guest lacks" in done.stderr
    assert "layers.1" in done.stderr
    assert Forest.open(forest).domains == ["code", "docs"]


def test_mdel_33_every_training_reports_its_loss_on_every_domain(forest):
    """huu4ontocord/MDEL#33: validation loss per domain, not one average over all."""
    for run in ("seed", "dense"):
        rows = [json.loads(line) for line in (forest / f"runs/{run}/metrics.jsonl").read_text().splitlines()]
        evaluated = {key for row in rows for key in row if key.startswith("eval/")}
        assert {"eval/code/loss", "eval/docs/loss"} <= evaluated


def test_mdel_43_every_average_is_evaluated_on_every_domain(forest):
    """huu4ontocord/MDEL#43: merges are judged on all domains beside the models that went in."""
    models = Evaluation.load(forest / "evaluation.json").models
    for name in ("average/uniform", "average/posterior", "elm/code", "elm/docs"):
        assert set(models[name].domains) == {"code", "docs", "headers"}


def test_automodel_3303_the_tokens_drawn_from_each_domain_are_recorded(forest):
    """NVIDIA-NeMo/Automodel#3303: whether mixture weights were really used can be read afterwards."""
    drawn = TrainResult.load(forest / "runs/seed/result.json").realised_tokens
    assert set(drawn) == {"code", "docs"}
    assert sum(drawn.values()) == 20_480
    assert max(drawn.values()) - min(drawn.values()) <= 2048


def test_batch_logs_hold_whole_lines_and_no_control_characters(forest, tmp_path):
    """Progress in batch logs: neither the driver's output nor a worker's log redraws lines."""
    logs = [path.read_bytes() for path in forest.glob("runs/**/log.txt")]
    shutil.copytree(forest, tmp_path / "forest")
    logs.append(run_btm("evaluate", f"forest={tmp_path / 'forest'}", cwd=tmp_path).stdout.encode())
    assert logs
    for log in logs:
        assert b"\r" not in log
        assert b"\x1b" not in log


def test_hydra_1928_a_run_whose_elm_fails_exits_with_an_error(tmp_path):
    """hydra#1928: a task that raised was COMPLETED for the scheduler."""
    (tmp_path / "text.jsonl").write_text('{"text": "too little"}\n')
    arguments = [*SMOKE, f"data.domains.a={tmp_path / 'text.jsonl'}", f"forest={tmp_path / 'forest'}"]
    done = run_btm("run", *arguments, cwd=tmp_path, check=False)
    assert done.returncode == 1
    assert "prepare failed" in done.stderr


def test_noether_164_one_wrong_domain_stops_everything_before_it_begins(corpora, tmp_path):
    """Emmi-AI/noether#164: every member is checked before the first is started."""
    folder = tmp_path / "forest"
    arguments = [*SMOKE, *two_domains(corpora), "data.domains.law=/none.jsonl", f"forest={folder}"]
    done = run_btm("run", *arguments, cwd=tmp_path, check=False)
    assert done.returncode == 1
    assert "data of domain law: '/none.jsonl' matches no text file" in done.stderr
    assert not list(folder.glob("corpus/*/corpus.json"))


def test_hydra_1892_a_key_in_the_environment_reaches_no_file(forest, corpora, tmp_path):
    """hydra#1892: WANDB_API_KEY ended in files of every job; R15."""
    shutil.copytree(forest, tmp_path / "forest")
    arguments = [f"forest={tmp_path / 'forest'}", "domain=mail", f"data.path={corpora / 'mail.jsonl'}"]
    done = run_btm("add", *arguments, "tracking=wandb", cwd=tmp_path, WANDB_API_KEY=FAKE_KEY, WANDB_MODE="offline")
    assert FAKE_KEY not in done.stdout + done.stderr
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert any(path.suffix == ".wandb" for path in files)
    assert [path for path in files if FAKE_KEY.encode() in path.read_bytes()] == []
