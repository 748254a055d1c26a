"""The page `slurm/README.md` tried as a new user would: its commands are copied from it and run on a real Slurm.

What they name of a larger site (nodes, cores, GPUs) is replaced by what the two small nodes of the tests have; every
replacement must occur, so that a changed page is noticed here.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from slurm_cluster import until
from slurm_runs import RECIPE, elm_hashes

from btm.forest import Forest
from tests.conftest import run_btm

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "slurm" / "README.md").read_text()
DATA = "data.directory=corpora"
SMALL_RUN = (DATA, *RECIPE, "train.tokens=51200", "name=forest")
SMALL = {DATA: " ".join(SMALL_RUN)}


def blocks(section: str) -> list[str]:
    """The commands of one section of the page."""
    text = PAGE.partition(f"\n## {section}\n")[2].partition("\n## ")[0]
    found = re.findall(r"```bash\n(.*?)```", text, flags=re.DOTALL)
    assert found, f"the page has no commands in {section!r}"
    return found


def replaced(block: str, replacements: dict[str, str]) -> str:
    for old, new in replacements.items():
        assert old in block, f"the page does not say {old!r} any more"
        block = block.replace(old, new)
    return block


class Shell:
    """A login shell in a checkout, with its environment activated."""

    def __init__(self, cluster, directory: Path) -> None:
        self.directory = directory
        self._cluster = cluster
        self._before = set(cluster.jobs("--states=all"))
        path = f"{Path(sys.executable).parent}:{cluster.env['PATH']}"
        self._env = {**os.environ, **cluster.env, "PATH": path}

    def run(self, commands: str, *, exit_code: int = 0) -> str:
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", commands],
            cwd=self.directory,
            env=self._env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=800,
            check=False,
        )
        assert done.returncode == exit_code, f"{commands}\n{done.stdout[-4000:]}"
        return done.stdout

    def states(self) -> dict[int, str]:
        """Jobs that were submitted here -> how they stand."""
        lines = self._cluster.command("squeue", "--noheader", "--array", "--states=all", "--format=%A %T").splitlines()
        jobs = {int(line.split()[0]): line.split()[1] for line in lines}
        return {job: state for job, state in jobs.items() if job not in self._before}

    def wait(self) -> None:
        """Wait for the end of all jobs; they must end well."""
        until(lambda: not self._cluster.jobs(), timeout_s=600, what=lambda: str(self.states()))
        logs = [path.read_text()[-2000:] for path in self.directory.glob("slurm-*.out")]
        assert set(self.states().values()) == {"COMPLETED"}, (self.states(), logs)


@pytest.fixture
def shell(cluster, tmp_path, corpora) -> Shell:
    (tmp_path / "corpora").mkdir()
    shutil.copy(corpora / "code.jsonl", tmp_path / "corpora" / "code.jsonl")
    shutil.copy(corpora / "docs.jsonl", tmp_path / "corpora" / "law.jsonl")
    (tmp_path / "slurm").symlink_to(ROOT / "slurm")
    return Shell(cluster, tmp_path)


def complete(forest: Path) -> bool:
    return set(elm_hashes(forest)) == {"code", "law"}


def test_one_job_per_step(shell):
    (block,) = blocks("One job per step")
    output = shell.run(replaced(block, SMALL))
    assert re.search(r"sbatch --parsable --job-name=elm/law\S* --nodes=1", output)  # the dry run
    assert complete(shell.directory / "outputs/forest")


def test_an_array_without_a_driver_and_by_hand(shell):
    alone, by_hand = blocks("An array, without a driver")
    shell.run(replaced(alone, SMALL))
    shell.wait()
    forest = shell.directory / "outputs/forest"
    assert complete(forest)
    hashes = elm_hashes(forest)
    shutil.rmtree(forest)
    shell.run(replaced(by_hand, {**SMALL, "--array=0-3%2": "--array=0-1%2"}))
    shell.wait()
    assert elm_hashes(forest) == hashes


def test_a_ray_cluster_inside_one_allocation(shell):
    (block,) = blocks("A Ray cluster inside one allocation")
    here = {"--nodes=4": "--nodes=2 --partition=gpu", "--cpus-per-task=32": "--cpus-per-task=2", "gpu:8": "gpu:1"}
    shell.run(replaced(block, {**SMALL, **here}))
    shell.wait()
    assert complete(shell.directory / "outputs/forest")


def test_one_elm_on_several_nodes(shell):
    (block,) = blocks("One ELM on several nodes")
    here = {"launch.gpus_per_elm=16": "launch.gpus_per_elm=2", "launch.cpus_per_elm=64": "launch.cpus_per_elm=2"}
    shell.run(replaced(block, {**SMALL, **here}))
    forest = shell.directory / "outputs/forest"
    assert complete(forest)
    assert (forest / "runs/elm/law/log.node1.txt").is_file()


def test_an_elm_on_another_cluster(shell):
    (block,) = blocks("An ELM on another cluster")
    run_btm("step", *SMALL_RUN, "steps=[prepare,seed]", cwd=shell.directory)
    export, there, back = block.splitlines()
    shell.run(export)
    shell.run(replaced(there, {"--cpus-per-task=16": "--cpus-per-task=1"}))
    shell.wait()
    shell.run(back)
    assert Forest.open(shell.directory / "outputs/forest").domains == ["law"]


def test_a_sweep_of_which_one_run_fails(shell):
    (block,) = blocks("Sweeps")
    install, command = block.split("\n", 1)
    assert install.startswith("pip install -e '.[sweep]'")
    here = {"cpus_per_task=8": "cpus_per_task=1"}
    shell.run(replaced(command, {**SMALL, **here}))
    shell.wait()
    forests = [shell.directory / "outputs/sweep" / str(number) for number in range(2)]
    assert all(complete(forest) for forest in forests)
    assert elm_hashes(forests[0]) != elm_hashes(forests[1])
    failing = replaced(
        command,
        {
            **here,
            DATA: SMALL[DATA].replace(DATA, "data.directory=missing,corpora"),
            "outputs/sweep": "outputs/again",
            "train.lr=5e-4,1e-3": "train.lr=5e-4",
        },
    )
    before = set(shell.states())
    output = shell.run(failing, exit_code=1)
    assert "exit code 2" in output
    until(lambda: "RUNNING" not in shell.states().values() and "COMPLETING" not in shell.states().values())
    states = {job: state for job, state in shell.states().items() if job not in before}
    assert sorted(states.values()) == ["COMPLETED", "FAILED"], states
    logs = "".join(path.read_text() for path in shell.directory.glob("multirun/.submitit/*/*_log.err"))
    assert "data.directory must be a directory that holds text files" in logs
