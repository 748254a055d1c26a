"""What of the expert layers of a real run reaches its report and Weights & Biases."""

import json
from pathlib import Path
from typing import Any

import pytest

from btm.evaluate.report_data import load_report_data
from btm.evaluate.report_experts import class_shares, domain_shares, expert_series
from btm.metrics import is_dev_row
from tests.btm.test_tracking import wandb_history
from tests.conftest import SMOKE, run_btm, two_domains


@pytest.fixture(scope="module")
def tracked_run(tmp_path_factory, corpora) -> Path:
    """A sparse model with dropping and losses, mirrored offline."""
    folder = tmp_path_factory.mktemp("tracked")
    run_btm(
        "run", *SMOKE, *two_domains(corpora), "ffn=top_k", "ffn.num_experts=4", "ffn.capacity_factor=1",
        "train.tokens=16384", "tracking=wandb", "tracking.mode=offline", f"forest={folder / 'forest'}", cwd=folder,
    )  # fmt: skip
    return folder / "forest"


def metrics(forest: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (forest / "runs/sparse/metrics.jsonl").read_text().splitlines()]


def test_weights_and_biases_gets_every_expert_metric_of_every_row(tracked_run):
    (segment,) = tracked_run.glob("wandb/offline-run-*/run-*.wandb")
    history = wandb_history(tracked_run, segment.stem.removeprefix("run-"))
    rows = metrics(tracked_run)
    written = {(row["update"], key): value for row in rows for key, value in row.items() if "experts/" in key}
    sent = {(row["update"], key): value for row in history for key, value in row.items() if "experts/" in key}
    keys = {key for _, key in written}
    for block in (0, 1):
        assert {f"experts/{block}/{what}" for what in ("load", "entropy", "dropped", "load_balance", "z")} <= keys
        assert {f"eval/{domain}/experts/{block}" for domain in ("code", "docs")} <= keys
    assert sent == written


def test_the_report_shows_what_training_logged(tracked_run):
    (run,) = [run for run in load_report_data(tracked_run).runs if run.name == "sparse"]
    rows = metrics(tracked_run)
    last = [row for row in rows if is_dev_row(row)][-1]
    series = expert_series(run.rows)
    for block, one in enumerate(series["dropped"]):
        assert one.values == [row[f"experts/{block}/dropped"] for row in rows if not is_dev_row(row)]
        assert max(one.values) > 0
    for layer in domain_shares(run.rows):
        for domain, shares in zip(layer.domains, layer.shares, strict=True):
            counts = last[f"eval/{domain}/experts/{layer.block}"]
            assert shares == pytest.approx([count / sum(counts) for count in counts])
    page = (tracked_run / "report.html").read_text()
    assert "<h1>Sparse model smoke</h1>" in page
    assert "2 blocks have expert layers (0, 1, counted from 0 at the input)" in page
    assert "Which expert reads which domain" in page
    assert "Which expert reads which kind of token" in page
    assert {"word_start", "punctuation"} <= set(class_shares(run.rows)[0].domains)
    assert "baselines.dense=true" in page  # no dense model was trained: the comparison says so
