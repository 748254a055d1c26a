"""One ELM on two nodes of a Ray cluster, of which one is lost in the middle."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from ray_nodes import begun_again, driver, has_checkpoint, last_update, two_ray_nodes, wait_while_running, weights

from tests.conftest import SMOKE

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.distributed, pytest.mark.timeout(600)]

UPDATES, CHECKPOINT_EVERY = 300, 20
SIZES = {
    "engine.dtype": "fp32",
    "engine.num_processes": 2,
    "launch.cpus_per_elm": 2,
    "train.batch_tokens": 2 * 64,
    "train.tokens": 2 * 64 * UPDATES,
    "train.checkpoint_every": CHECKPOINT_EVERY,
    "train.seed_fraction": 0.1,
    "train.log_every": 1,
    "train.eval_every": 1000,
}


def command(forest: Path, corpora: Path, *more: str) -> list[str]:
    overrides = [f"{key}={value}" for key, value in SIZES.items()]
    domain = f"data.domains.code={corpora / 'code.jsonl'}"
    return [sys.executable, "-m", "btm.cli", "run", *SMOKE, domain, *overrides, f"forest={forest}", *more]


def test_an_elm_on_two_nodes_survives_a_lost_one_and_equals_that_of_one_machine(tmp_path, corpora):
    quiet, forest, log = tmp_path / "quiet", tmp_path / "forest", tmp_path / "driver.log"
    done = subprocess.run(command(quiet, corpora), capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout[-1500:] + done.stderr[-1500:]
    run = forest / "runs/elm/code"
    with two_ray_nodes(tmp_path, num_cpus=1) as nodes:
        ray = ("launch=ray", f"launch.ray_address={nodes.address}", "launch.nodes_per_elm=2")
        with driver(command(forest, corpora, *ray), log, nodes.env) as process:
            wait_while_running(process, lambda: has_checkpoint(run), log)
            nodes.lose_node()
            reached = last_update(run)
            wait_while_running(process, lambda: "restart 1 from its checkpoint" in log.read_text(), log)
            nodes.add_node()
            code = process.wait(300)
    output = log.read_text()
    assert code == 0, output[-3000:]
    assert len(re.findall("restart . from its checkpoint", output)) == 1
    assert (run / "log.node1.txt").is_file()  # the second process wrote on the second node
    again = begun_again(run)
    assert again is not None
    assert again % CHECKPOINT_EVERY == 0
    assert reached - again <= CHECKPOINT_EVERY + 1
    assert weights(forest) == weights(quiet)
    assert set(weights(forest)) == {"code"}
