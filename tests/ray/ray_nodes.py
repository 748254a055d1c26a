"""A cluster of Ray nodes on one machine, in a process of its own, and what the tests read of a run on it."""

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from btm.files import sha256_of_file

_PROGRAM = """
import sys
from ray.cluster_utils import Cluster

num_cpus = int(sys.argv[1])
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": num_cpus})
other = cluster.add_node(num_cpus=num_cpus)
print(cluster.address, flush=True)
for line in sys.stdin:
    if line.strip() == "lose":
        cluster.remove_node(other, allow_graceful=False)
    else:
        other = cluster.add_node(num_cpus=num_cpus)
    print("done", flush=True)
cluster.shutdown()
"""


class RayNodes:
    """The head and one more node; :func:`two_ray_nodes` makes them."""

    def __init__(self, process: subprocess.Popen[str], env: dict[str, str]) -> None:
        self._process = process
        self.env = env
        """Environment of everybody who may use the cluster."""
        self.address = self._answer()

    def lose_node(self) -> None:
        """KILL to everything of the second node."""
        self._ask("lose")

    def add_node(self) -> None:
        """Another second node."""
        self._ask("add")

    def _ask(self, what: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{what}\n")
        self._process.stdin.flush()
        assert self._answer() == "done"

    def _answer(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()


@contextmanager
def two_ray_nodes(folder: Path, *, num_cpus: int) -> Iterator[RayNodes]:
    """A cluster of two nodes with ``num_cpus`` cores each, that asks for a token."""
    token = folder / "token"
    token.write_text("a token of the test's own, long enough")
    token.chmod(0o600)
    outer = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    env = {**outer, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as short:
        (Path(short) / "ray").mkdir()
        process = subprocess.Popen(
            [sys.executable, "-c", _PROGRAM, str(num_cpus)],
            env={**env, "RAY_TMPDIR": short},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stdin is not None
        try:
            yield RayNodes(process, env)
        finally:
            process.stdin.close()
            process.wait(60)


@contextmanager
def driver(command: list[str], log: Path, env: dict[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    """A run in the background, ended with the block."""
    with open(log, "wb") as file:
        process = subprocess.Popen(command, env=env, stdout=file, stderr=file)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def wait_while_running(process: subprocess.Popen[bytes], condition: Callable[[], object], log: Path) -> None:
    """Until ``condition`` holds; the run must not end before."""
    deadline = time.monotonic() + 300
    while not condition():
        assert process.poll() is None, f"the run ended too early\n{log.read_text()[-3000:]}"
        assert time.monotonic() < deadline, log.read_text()[-3000:]
        time.sleep(0.1)


def has_checkpoint(run: Path) -> bool:
    """Whether a training has written one."""
    return any((run / "checkpoints").glob("step-*"))


def last_update(run: Path) -> int:
    """The newest update of which there are metrics."""
    lines = (run / "metrics.jsonl").read_text().splitlines() if (run / "metrics.jsonl").exists() else []
    return max((json.loads(line)["update"] for line in lines if line.endswith("}")), default=0)


def begun_again(run: Path) -> int | None:
    """Update from whose checkpoint a training went on; None for one that never stopped."""
    begins = [int(number) for number in re.findall(r"updates (\d+) to \d+", (run / "log.txt").read_text())]
    return begins[-1] - 1 if len(begins) > 1 else None


def weights(forest: Path) -> dict[str, str]:
    """ELM -> hash of its weights."""
    return {path.parent.name: sha256_of_file(path) for path in sorted(forest.glob("elms/*/model.safetensors"))}
