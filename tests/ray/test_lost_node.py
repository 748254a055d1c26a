"""`btm run launch=ray` on a cluster of two nodes, of which one dies in the middle."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from ray_nodes import begun_again, driver, has_checkpoint, last_update, two_ray_nodes, wait_while_running, weights

from btm.forest import Forest
from tests.conftest import SMOKE

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600)]

NUM_ELMS, UPDATES, CHECKPOINT_EVERY = 6, 300, 20


@pytest.fixture
def domains(tmp_path: Path, corpora: Path) -> list[str]:
    """Overrides for six domains: every second document of three texts."""
    found = []
    for source in ("code", "docs", "headers"):
        lines = list(dict.fromkeys((corpora / f"{source}.jsonl").read_text().splitlines(keepends=True)))
        for half in range(2):
            path = tmp_path / f"{source}-{half}.jsonl"
            path.write_text("".join(lines[half::2]))
            found.append(f"data.domains.{source}-{half}={path}")
    return found


def command(forest: Path, domains: list[str], *more: str) -> list[str]:
    batch = NUM_ELMS * 2 * 64
    sizes = {
        "train.batch_tokens": batch,
        "train.tokens": batch * UPDATES,
        "train.checkpoint_every": CHECKPOINT_EVERY,
        "train.seed_fraction": 0.1,
        "train.log_every": 1,
        "train.eval_every": 1000,
        "data.dev_fraction": 0.2,
        "data.test_fraction": 0.2,
        "data.on_error": "skip",
    }
    overrides = [f"{key}={value}" for key, value in sizes.items()]
    return [sys.executable, "-m", "btm.cli", "run", *SMOKE, *domains, *overrides, f"forest={forest}", *more]


def test_all_elms_finish_after_a_node_was_lost(tmp_path, domains):
    quiet, forest, log = tmp_path / "quiet", tmp_path / "forest", tmp_path / "driver.log"
    done = subprocess.run(command(quiet, domains), capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout[-1500:] + done.stderr[-1500:]
    runs = [forest / "runs/elm" / name.split("=")[0].removeprefix("data.domains.") for name in domains]
    with two_ray_nodes(tmp_path, num_cpus=3) as nodes:
        ray = ("launch=ray", f"launch.ray_address={nodes.address}", "launch.cpus_per_elm=1")
        with driver(command(forest, domains, *ray), log, nodes.env) as process:
            wait_while_running(process, lambda: all(has_checkpoint(run) for run in runs), log)
            nodes.lose_node()
            reached = {run.name: last_update(run) for run in runs}
            code = process.wait(400)
    output = log.read_text()
    assert code == 0, output[-3000:]
    assert len(Forest.open(forest).domains) == NUM_ELMS
    again = {run.name: begun_again(run) for run in runs}
    lost = {name: reached[name] - update for name, update in again.items() if update is not None}
    print(f"restarted: {len(lost)} of {NUM_ELMS}, updates done twice: {lost}, checkpoints every {CHECKPOINT_EVERY}")
    assert 1 <= len(lost) <= 3
    assert len(re.findall("restart 1 from its checkpoint", output)) == len(lost)
    # The metrics of an update may be read a moment before the node dies, those of the next never.
    assert all(twice <= CHECKPOINT_EVERY + 1 for twice in lost.values())
    assert weights(forest) == weights(quiet)
