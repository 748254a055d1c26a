import os
import random
import subprocess
import time
from pathlib import Path

import pytest
from killed_runs import btm_command

from tests.conftest import SMOKE

DOMAINS = ("code", "docs", "mail")
RECIPE = (
    *SMOKE,
    "engine.dtype=fp32",
    "baselines=dense",
    "data.max_documents=100",
    "data.num_workers=1",
    "model.num_layers=1",
    "train.tokens=172800",
    "train.batch_tokens=192",
    "train.sequence_length=32",
    "train.checkpoint_every=10",
    "train.eval_every=50",
    "train.eval_tokens=512",
    "train.log_every=1",
    "evaluate.max_tokens=1024",
    "launch.max_restarts=100",
)
"""450 updates of the seed model, 450 of each ELM and of the dense one; a checkpoint every 10."""


@pytest.fixture(scope="session")
def env() -> dict[str, str]:
    """Equal for every run, threads included; threads that wait do not take the cores of those that work."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "PYTHONWARNINGS": "ignore"}


@pytest.fixture(scope="session")
def arguments(corpora) -> tuple[str, ...]:
    """Of ``btm``, but for the forest."""
    return ("run", *RECIPE, *(f"data.domains.{name}={corpora / name}.jsonl" for name in DOMAINS))


@pytest.fixture(scope="session")
def reference(tmp_path_factory, arguments, env) -> Path:
    """The forest of a run that nothing disturbs."""
    forest = tmp_path_factory.mktemp("reference") / "forest"
    began = time.monotonic()
    command = btm_command(*arguments, f"forest={forest}")
    done = subprocess.run(command, cwd=forest.parent, env=env, capture_output=True, text=True, timeout=170, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    print(f"\nuninterrupted: {time.monotonic() - began:.0f} s")
    return forest


@pytest.fixture
def generator(request) -> random.Random:
    """Seeded, so that the choice of victims and moments is repeatable (what they meet is up to the scheduler)."""
    return random.Random(request.node.name)
