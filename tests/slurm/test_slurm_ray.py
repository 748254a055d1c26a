"""A Ray cluster inside one allocation (`slurm/ray.sbatch`) on two real nodes, whatever happens to it."""

import sys
from pathlib import Path

import pytest
from slurm_cluster import Cluster, until
from slurm_runs import elm_hashes, first_updates, held, stopped_updates, wait_until_told

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
SCRIPT = Path(__file__).resolve().parents[2] / "slurm" / "ray.sbatch"
ELMS = ("elm/code", "elm/docs")
WHOLE_NODES = "launch.cpus_per_elm=2"
"""One ELM per node."""


class Job:
    """The script with a run of two ELMs on two nodes."""

    def __init__(self, cluster: Cluster, forest: Path, overrides: tuple[str, ...], *options: str) -> None:
        self.forest = forest
        self._cluster, self._log = cluster, forest.parent / "ray.log"
        size = ("--nodes=2", "--exclusive", "--cpus-per-task=2", f"--output={self._log}")
        arguments = (*size, *options, str(SCRIPT), *overrides, f"forest={forest}")
        self.number = cluster.sbatch(*arguments, env={"BTM_PYTHON": sys.executable})

    def finish(self) -> None:
        """Wait for its good end, which leaves nothing behind on the nodes."""
        self._cluster.wait_for(self.number, "COMPLETED", "FAILED", "CANCELLED", timeout_s=600)
        assert self._cluster.state(self.number) == "COMPLETED", self.log()
        assert set(elm_hashes(self.forest)) == {"code", "docs"}

    def log(self) -> str:
        return self._log.read_text()[-6000:] if self._log.exists() else "no log"


@pytest.fixture
def no_process_left(cluster):
    yield
    for node in cluster.nodes:
        until(lambda node=node: len(cluster.pids(node)) <= 1, timeout_s=30, what=lambda: "Ray is left")


def test_a_forest_from_nothing(cluster, tmp_path, arguments, no_process_left):
    short = tuple(item if "train.tokens" not in item else "train.tokens=51200" for item in arguments)
    Job(cluster, tmp_path / "forest", short).finish()
    assert not cluster.jobs()


def test_a_lost_node_takes_only_its_own_elm_with_it(cluster, forest, arguments, reference, no_process_left):
    job = Job(cluster, forest, (*arguments, WHOLE_NODES))
    with held(forest, ELMS):
        first = cluster.field(job.number, "BatchHost")
        lost = next(node for node in cluster.nodes if node != first)
        cluster.kill_node(lost)
    try:
        job.finish()
    finally:
        cluster.start_node(lost)
        until(lambda: cluster.idle_nodes() == 2, timeout_s=120)
    quiet, disturbed = sorted((first_updates(forest, elm) for elm in ELMS), key=len)
    assert (len(quiet), len(disturbed)) == (1, 2)
    assert disturbed[1] > 50
    assert cluster.field(job.number, "Restarts") == "0"
    assert elm_hashes(forest) == reference


def test_before_the_limit_every_elm_writes_a_checkpoint_and_the_job_goes_on(cluster, forest, arguments, reference):
    job = Job(cluster, forest, arguments, "--signal=B:USR2@60")
    with held(forest, ELMS) as pids:
        cluster.limit(job.number, minutes_more=1)
        wait_until_told(pids)
        cluster.limit(job.number, minutes_more=20)
    job.finish()
    assert cluster.field(job.number, "Restarts") == "1"
    for elm in ELMS:
        stopped = stopped_updates(forest, elm)
        assert stopped
        assert first_updates(forest, elm)[1:] == [update + 1 for update in stopped]
    assert elm_hashes(forest) == reference


def test_after_a_preemption_the_elms_go_on_from_their_last_checkpoints(cluster, forest, arguments, reference):
    job = Job(cluster, forest, arguments, "--partition=low")
    with held(forest, ELMS):
        urgent = cluster.sbatch("-phigh", "-N2", "--exclusive", "--output=/dev/null", "--wrap", "true")
        cluster.wait_for(urgent, "COMPLETED")
    job.finish()
    assert cluster.field(job.number, "Restarts") == "1"
    assert all(first_updates(forest, elm)[1] > 50 for elm in ELMS)
    assert elm_hashes(forest) == reference
