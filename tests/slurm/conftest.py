"""A real Slurm for these tests: ``make test-slurm`` installs it. Without it they are skipped, with the reason."""

import os
import shutil
import sys
import tempfile
from pathlib import Path

import pytest

for folder in (Path(__file__).parent / "programs", Path(__file__).parent.parent / "launch" / "programs"):
    # Tasks find their modules where the driver does.
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

from slurm_cluster import Cluster, missing  # noqa: E402
from slurm_runs import RECIPE, elm_hashes  # noqa: E402

from tests.conftest import run_btm, two_domains  # noqa: E402


@pytest.fixture(scope="session")
def cluster():
    """Two nodes of two cores."""
    problem = missing()
    if problem:
        pytest.skip(f"no Slurm: {problem}")
    directory = Path(tempfile.mkdtemp(prefix="sl"))
    made = Cluster(directory)
    # Programs that these tests start find it by the environment.
    before = dict(os.environ)
    os.environ.update(made.env)
    try:
        yield made
    finally:
        os.environ.clear()
        os.environ.update(before)
        made.close()
        shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture(scope="session")
def arguments(corpora) -> tuple[str, ...]:
    """Overrides of a run of two ELMs whose trainings take long enough to be interrupted."""
    return (*RECIPE, "train.tokens=1024000", *two_domains(corpora)[:2])


@pytest.fixture(scope="session")
def seeded(tmp_path_factory, arguments) -> Path:
    """A forest with its corpus and seed; tests work on copies."""
    forest = tmp_path_factory.mktemp("seeded") / "forest"
    run_btm("step", *arguments, "steps=[prepare,seed]", f"forest={forest}", cwd=forest.parent)
    return forest


@pytest.fixture(scope="session")
def reference(tmp_path_factory, seeded, arguments) -> dict[str, str]:
    """Hashes of the ELMs' weights of a run that nothing disturbs."""
    forest = tmp_path_factory.mktemp("reference") / "forest"
    shutil.copytree(seeded, forest)
    run_btm("run", *arguments, f"forest={forest}", cwd=forest.parent)
    return elm_hashes(forest)


@pytest.fixture
def forest(tmp_path, seeded) -> Path:
    """A copy of the seeded forest."""
    shutil.copytree(seeded, tmp_path / "forest")
    return tmp_path / "forest"
