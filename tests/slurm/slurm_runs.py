"""What the tests on a real Slurm run, and what they read of it."""

import subprocess
import sys
from pathlib import Path

from slurm_cluster import until

from tests.conftest import SMOKE

RECIPE = (
    *SMOKE,
    "engine.dtype=fp32",
    "data.max_documents=60",
    "data.num_workers=1",
    "tokenizer.train_bytes=100000",
    "model.num_layers=1",
    "train.batch_tokens=512",
    "train.seed_fraction=0.02",
    "train.sequence_length=32",
    "train.checkpoint_every=50",
    "train.eval_every=1000000",
    "train.eval_tokens=256",
    "train.log_every=1",
    "evaluate.max_tokens=512",
)
ELM = "elm/code"


def elm_hashes(forest: Path) -> dict[str, str]:
    """ELM -> hash of its weights, after a check that the forest is complete."""
    from btm.forest import Forest

    opened = Forest.open(forest)
    assert (forest / "evaluation.json").is_file()
    assert (forest / "report.html").is_file()
    return {record.domain: record.files["model.safetensors"] for record in opened.manifest.elms}


def start_btm(*arguments: str, cwd: Path) -> subprocess.Popen[str]:
    """Start the real command."""
    return subprocess.Popen(
        [sys.executable, "-m", "btm.cli", *arguments],
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_for_checkpoint(driver: subprocess.Popen[str], forest: Path, step: str = ELM) -> None:
    """Wait until a training of a run that goes on has one."""

    def look() -> bool:
        if driver.poll() is not None:
            raise AssertionError(f"the driver ended with {driver.returncode}: {driver.communicate()[0]}")
        return bool(checkpoints(forest, step))

    until(look, timeout_s=180, what=lambda: str(driver.poll()))


def checkpoints(forest: Path, step: str = ELM) -> list[int]:
    """Updates of the checkpoints that are there."""
    return sorted(int(path.name[5:]) for path in (forest / "runs" / step / "checkpoints").glob("step-*"))


def stopped_updates(forest: Path, step: str = ELM) -> list[int]:
    """Updates after which a training stopped because it was asked to."""
    words = "stopped on request after update "
    lines = [line for line in _log(forest, step) if words in line]
    return [int(line.partition(words)[2].partition(";")[0]) for line in lines]


def first_updates(forest: Path, step: str = ELM) -> list[int]:
    """First update of each start of a training."""
    lines = [line for line in _log(forest, step) if "training " in line and "updates " in line]
    return [int(line.partition("updates ")[2].split()[0]) for line in lines]


def _log(forest: Path, step: str) -> list[str]:
    path = forest / "runs" / step / "log.txt"
    return path.read_text().splitlines() if path.exists() else []
