import os
import random
import subprocess
import time
from pathlib import Path

import pytest
from kill_recipe import DOMAINS, RECIPE
from killed_runs import btm_command


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
