"""Fixtures for all tests: one thread, real text that every Python has, and forests made once."""

import json
import os
import signal
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
if not any(Path("/dev").glob("nvidia[0-9]*")):
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports Triton: transformers does

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGCHLD)

SMOKE = ("experiment=smoke", "data.min_train_tokens=1000", "launch.poll_interval_s=0.05")


@pytest.fixture(autouse=True)
def _process_left_as_found() -> Iterator[None]:
    """A test that leaves another process behind decides how a later one ends, in some orders of the files only."""
    before = _process_state()
    yield
    after = _process_state()
    # What a library adds when it is imported is no test's doing.
    assert {name: after.get(name) for name in before} == before


def _process_state() -> dict[str, object]:
    state: dict[str, object] = {
        f"${name}": value for name, value in os.environ.items() if name != "PYTEST_CURRENT_TEST"
    }
    state |= {number.name: signal.getsignal(number) for number in _SIGNALS}
    state |= {"cores": os.sched_getaffinity(0), "working directory": os.getcwd()}
    if torch := sys.modules.get("torch"):
        state |= {"threads": torch.get_num_threads(), "dtype": torch.get_default_dtype()}
    return state


def run_btm(*arguments: str, cwd: Path, check: bool = True, **env: str) -> subprocess.CompletedProcess[str]:
    """Run the real command in a real process."""
    done = subprocess.run(
        [sys.executable, "-m", "btm.cli", *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=170,
        env={**os.environ, **env},
        check=False,
    )
    if check and done.returncode:
        raise AssertionError(f"btm {' '.join(arguments)} exited with {done.returncode}\n{done.stdout}\n{done.stderr}")
    return done


@pytest.fixture(scope="session")
def corpora(tmp_path_factory) -> Path:
    """A directory with four small domains of real text: code, headers, docs (the language reference), licences."""
    from pydoc_data.topics import topics

    folder = tmp_path_factory.mktemp("corpora")
    stdlib = Path(sysconfig.get_path("stdlib"))
    _write(folder / "code.jsonl", [path.read_text("utf-8") for path in sorted(stdlib.glob("[a-m]*.py"))[:60]])
    headers = sorted(Path(sysconfig.get_path("include")).rglob("*.h"))
    _write(folder / "headers.jsonl", [path.read_text("utf-8", "replace") for path in headers[:120]])
    _write(folder / "docs.jsonl", list(topics.values()))
    _write(folder / "mail.jsonl", [path.read_text("utf-8") for path in sorted(stdlib.glob("email/*.py"))])
    return folder


@pytest.fixture(scope="session")
def forest(tmp_path_factory, corpora) -> Path:
    """A forest of two ELMs with every baseline, trained by `btm run`; tests must not change it."""
    folder = tmp_path_factory.mktemp("run")
    run_btm("run", *SMOKE, *two_domains(corpora), "baselines=all", f"forest={folder / 'forest'}", cwd=folder)
    return folder / "forest"


def two_domains(corpora: Path) -> tuple[str, ...]:
    """Overrides that train on two domains and evaluate on a third."""
    return (
        f"data.domains.code={corpora / 'code.jsonl'}",
        f"data.domains.docs={corpora / 'docs.jsonl'}",
        f"data.novel.headers={corpora / 'headers.jsonl'}",
    )


def _write(path: Path, texts: list[str]) -> None:
    pieces = [text[start : start + 6000] for text in texts for start in range(0, len(text), 6000)]
    path.write_text("".join(json.dumps({"text": piece}) + "\n" for piece in pieces if len(piece) > 200))
