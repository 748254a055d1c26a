"""`btm run launch=ray` on a cluster of two nodes, of which one dies in the middle."""

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from btm.files import sha256_of_file
from btm.forest import Forest
from tests.conftest import SMOKE

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600)]

NUM_ELMS, UPDATES, CHECKPOINT_EVERY = 6, 300, 20
TWO_NODES = """
import sys
from ray.cluster_utils import Cluster

cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 3})
other = cluster.add_node(num_cpus=3)
print(cluster.address, flush=True)
sys.stdin.readline()
cluster.remove_node(other, allow_graceful=False)
print("lost", flush=True)
sys.stdin.read()
cluster.shutdown()
"""


@pytest.fixture
def token(tmp_path: Path) -> dict[str, str]:
    """Environment of everybody who may use the cluster."""
    path = tmp_path / "token"
    path.write_text("a token of the test's own, long enough")
    path.chmod(0o600)
    return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(path)}


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


def last_update(run: Path) -> int:
    lines = (run / "metrics.jsonl").read_text().splitlines() if (run / "metrics.jsonl").exists() else []
    return max((json.loads(line)["update"] for line in lines if line.endswith("}")), default=0)


def weights(forest: Path) -> dict[str, str]:
    return {path.parent.name: sha256_of_file(path) for path in sorted(forest.glob("elms/*/model.safetensors"))}


def test_all_elms_finish_after_a_node_was_lost(tmp_path, domains, token):
    environment = {**{k: v for k, v in os.environ.items() if not k.startswith("RAY_")}, **token}
    quiet, forest = tmp_path / "quiet", tmp_path / "forest"
    done = subprocess.run(command(quiet, domains), capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout[-1500:] + done.stderr[-1500:]
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder:
        (Path(folder) / "ray").mkdir()
        cluster = subprocess.Popen(
            [sys.executable, "-c", TWO_NODES],
            env={**environment, "RAY_TMPDIR": folder}, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert cluster.stdin is not None
        assert cluster.stdout is not None
        try:
            address = cluster.stdout.readline().strip()
            with open(tmp_path / "driver.log", "w") as log:
                ray = ["launch=ray", f"launch.ray_address={address}", "launch.cpus_per_elm=1"]
                driver = subprocess.Popen(command(forest, domains, *ray), env=environment, stdout=log, stderr=log)
            runs = [forest / "runs/elm" / name.split("=")[0].removeprefix("data.domains.") for name in domains]
            wait_for_checkpoints(driver, runs)
            cluster.stdin.write("kill\n")
            cluster.stdin.flush()
            assert cluster.stdout.readline().strip() == "lost"
            reached = {run.name: last_update(run) for run in runs}
            code = driver.wait(400)
        finally:
            driver.kill()
            cluster.stdin.close()
            cluster.wait(60)
    output = (tmp_path / "driver.log").read_text()
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


def wait_for_checkpoints(driver: subprocess.Popen, runs: list[Path]) -> None:
    """Until every ELM has one; all must still be training then."""
    deadline = time.monotonic() + 300
    while not all(list((run / "checkpoints").glob("step-*")) for run in runs):
        assert driver.poll() is None, "the run ended before every ELM had a checkpoint"
        assert time.monotonic() < deadline
        time.sleep(0.1)


def begun_again(run: Path) -> int | None:
    """Update from whose checkpoint a training went on; None for one that never stopped."""
    begins = [int(number) for number in re.findall(r"updates (\d+) to \d+", (run / "log.txt").read_text())]
    return begins[-1] - 1 if len(begins) > 1 else None
