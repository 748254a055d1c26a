"""R1 for sparse models: a training with expert layers, and a domain that joins a DEMix model, killed on the way."""

import os
import shutil
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from forest_outcome import differences, leftovers, outcome
from kill_recipe import RECIPE
from killed_runs import Aim, KilledRun, btm_command, table

from btm.sparse_models import SparseModels

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]

SPARSE = (
    *RECIPE,
    "baselines=none",
    "train.tokens=38400",
    "data.max_documents=60",
    "evaluate.max_tokens=256",
    "evaluate.bootstrap_samples=10",
)
"""200 updates with a checkpoint every 10."""
TOP_K = ("ffn=top_k", "ffn.num_experts=4", "ffn.balance=global", "train.micro_batch_sequences=2")
RUN_AIMS = Counter(
    {
        Aim("driver", "checkpoint"): 1,
        Aim("worker", "random"): 1,
        Aim("worker", "checkpoint"): 2,
        Aim("worker", "result"): 1,
        Aim("fork server", "random"): 1,
    }
)
ADD_AIMS = Counter(
    {
        Aim("driver", "checkpoint"): 1,
        Aim("driver", "manifest"): 1,
        Aim("worker", "checkpoint"): 2,
        Aim("worker", "result"): 1,
    }
)


@dataclass(frozen=True, slots=True)
class Quiet:
    """Runs that nothing disturbs, side by side: they share nothing, and one thread each."""

    folder: Path
    env: dict[str, str]
    running: dict[str, subprocess.Popen[str]]

    def start(self, name: str, *arguments: str) -> None:
        self.running[name] = subprocess.Popen(
            btm_command(*arguments),
            cwd=self.folder,
            env=self.env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def finish(self, name: str) -> None:
        said, _ = self.running[name].communicate(timeout=170)
        assert self.running.pop(name).returncode == 0, said


@pytest.fixture(scope="module")
def quiet(tmp_path_factory, env) -> Iterator[Quiet]:
    made = Quiet(tmp_path_factory.mktemp("sparse"), env, {})
    yield made
    for process in made.running.values():
        process.kill()
        process.wait()


def arguments(corpora, *more: str) -> tuple[str, ...]:
    domains = (f"data.domains.{name}={corpora / name}.jsonl" for name in ("code", "docs"))
    return ("run", *SPARSE, *domains, *more)


def addition(corpora, forest: Path) -> tuple[str, ...]:
    return ("add", f"forest={forest}", "domain=mail", f"data.path={corpora / 'mail.jsonl'}")


def assert_same(expected: Path, run: KilledRun) -> None:
    print("\n" + table(run))
    found = differences(outcome(expected), outcome(run.forest))
    assert not found, "\n".join(found)
    assert leftovers(run.forest) == []


def test_r1_killed_sparse_runs_and_additions_end_with_the_same_bits(quiet, tmp_path, corpora, env, generator):
    began = time.monotonic()
    quiet.start("top_k", *arguments(corpora, *TOP_K, f"forest={quiet.folder / 'top_k'}"))
    quiet.start("demix", *arguments(corpora, "ffn=demix", f"forest={quiet.folder / 'demix'}"))
    quiet.finish("demix")
    quiet.finish("top_k")
    shutil.copytree(quiet.folder / "demix", tmp_path / "demix")
    quiet.start("add", *addition(corpora, quiet.folder / "demix"))

    forest = tmp_path / "top_k"
    run = KilledRun(
        btm_command(*arguments(corpora, *TOP_K, f"forest={forest}")), forest, env, list(RUN_AIMS.elements()), generator
    )
    run.run()
    assert_same(quiet.folder / "top_k", run)
    assert sum(cost.kills for cost in run.costs.values()) >= 5

    quiet.finish("add")
    grown = tmp_path / "demix"
    add = KilledRun(btm_command(*addition(corpora, grown)), grown, env, list(ADD_AIMS.elements()), generator)
    add.run()
    assert_same(quiet.folder / "demix", add)
    assert SparseModels.open(grown).domains == ["code", "docs", "mail"]
    assert sum(cost.kills for cost in add.costs.values()) >= 4
    print(f"{time.monotonic() - began:.0f} s; load average {os.getloadavg()[0]:.1f}")
