"""What the tests on a real Slurm run, and what they read of it."""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
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


@contextlib.contextmanager
def held(forest: Path, steps: Sequence[str] = (ELM,)) -> Iterator[list[int]]:
    """Freeze trainings at their first checkpoint for the time of the block: a fast machine ends none before it."""
    until(lambda: all(checkpoints(forest, step) for step in steps), timeout_s=240)
    pids = [pid for step in steps for pid in _writers(forest / "runs" / step / "log.txt")]
    assert len(pids) >= len(steps), "a training ended before it was held; make it longer"
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        until(lambda: all(map(_is_frozen, pids)))
        yield pids
    finally:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)


def wait_until_told(pids: Sequence[int]) -> None:
    """Wait until TERM has reached frozen processes: it waits for them, or Slurm woke those that it signals itself."""
    until(lambda: all(_has_term(pid) or not _is_frozen(pid) for pid in pids), timeout_s=240)


def stopped_updates(forest: Path, step: str = ELM) -> list[int]:
    """Updates after which a training stopped because it was asked to."""
    words = "stopped on request after update "
    lines = [line for line in _log(forest, step) if words in line]
    return [int(line.partition(words)[2].partition(";")[0]) for line in lines]


def first_updates(forest: Path, step: str = ELM) -> list[int]:
    """First update of each start of a training."""
    lines = [line for line in _log(forest, step) if "training " in line and "updates " in line]
    return [int(line.partition("updates ")[2].split()[0]) for line in lines]


def _writers(log: Path) -> list[int]:
    """Processes whose output is ``log``."""
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdigit() and os.readlink(entry / "fd/1") == str(log):
                found.append(int(entry.name))
    return found


def _is_frozen(pid: int) -> bool:
    return _status(pid).get("State", "").startswith("T")


def _has_term(pid: int) -> bool:
    """Whether TERM waits for a process."""
    masks = [int(_status(pid).get(name, "0"), 16) for name in ("SigPnd", "ShdPnd")]
    return any(mask >> (signal.SIGTERM - 1) & 1 for mask in masks)


def _status(pid: int) -> dict[str, str]:
    """What the system says of a process; nothing when it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return {}
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


def _log(forest: Path, step: str) -> list[str]:
    path = forest / "runs" / step / "log.txt"
    return path.read_text().splitlines() if path.exists() else []
