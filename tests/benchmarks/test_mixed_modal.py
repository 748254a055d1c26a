"""The mixed-modal comparison as a user starts it, on pieces of the photographs that come with scikit-learn."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from sklearn.datasets import load_sample_images

from btm.corpus.images.pictures import save_png
from btm.records import TRAINING_ROUTING, Evaluation, TrainResult

HERE = Path(__file__).parent
SMALL = ("model.hidden_size=32", "model.num_heads=1", "tokenizer.vocab_size=300", "tokenizer.image_codes=32")
SMALL += ("tokenizer.image_size=16", "train.batch_tokens=512", "train.sequence_length=64", "evaluate.max_tokens=2048")
SIDE = 16


def compare(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(HERE / "mixed_modal.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=500, check=False)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """Some 300 pieces with captions that say which photograph and how bright."""
    folder, rows = tmp_path_factory.mktemp("pieces"), []
    for name, photograph in zip(("temple", "flower"), load_sample_images().images, strict=True):
        for top in range(0, photograph.shape[0] - SIDE, 2 * SIDE):
            for left in range(0, photograph.shape[1] - SIDE, 3 * SIDE):
                piece = photograph[top : top + SIDE, left : left + SIDE]
                file = f"{name}-{top}-{left}.png"
                save_png(piece, folder / file)
                light = "bright" if piece.mean() > 128 else "dark"
                rows.append({"image": file, "caption": f"a {light} piece of a {name}, row {top}, column {left}"})
    (folder / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_all_models_are_trained_compared_and_kept(pictures, tmp_path):
    arguments = (str(pictures), "--out", str(tmp_path), "--tokens", "16384", "--", *SMALL)
    done = compare(*arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    stored = json.loads((tmp_path / "mixed_modal.json").read_text())
    rows = {(row["model"], row["routing"]): row for row in stored["rows"]}
    several = ("mixed-8", "4t4i", "4t4i+depths", "4t4i upcycled")
    both = [(name, how) for name in several for how in ("as in training", "causal")]
    assert set(rows) == {("dense", "-"), ("1t1i", "-"), *both}
    assert {row["tokens"] for row in rows.values()} == {16_384}, "equal tokens, those of the seed counted"
    dense = rows["dense", "-"]["flops_per_token"]
    assert all(row["flops_per_token"] == pytest.approx(dense, rel=0.15) for row in rows.values())
    evaluation = Evaluation.load(tmp_path / "4t4i/evaluation.json")
    gap = json.loads((tmp_path / "4t4i/summary.json").read_text())["routing_gap"]["pictures"]
    losses = {how: rows["4t4i", how] for how in ("as in training", "causal")}
    for kind, key in (("all", "loss"), ("text", "text"), ("image", "image")):
        assert gap[kind] == pytest.approx(losses["causal"][key] - losses["as in training"][key])
    assert "cannot generate" in evaluation.models[TRAINING_ROUTING].note
    routers = TrainResult.load(tmp_path / "4t4i/runs/routers/result.json")
    assert routers.ledger.tokens == 4096
    assert routers.ledger.flops / 4096 < 0.5 * dense
    assert "as in training" in done.stdout
    assert "upcycling: dev loss" in done.stdout
    again = compare(*arguments)
    assert again.stdout.splitlines()[-20:] == done.stdout.splitlines()[-20:], "nothing is trained twice"


def test_a_folder_without_captions_is_refused(tmp_path):
    done = compare(str(tmp_path))
    assert done.returncode == 2
    assert f"{tmp_path} has no captions.jsonl" in done.stderr
