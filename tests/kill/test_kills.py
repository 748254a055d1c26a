"""R1, R2, R6, R8: SIGKILL everything at random moments; the result is bit for bit that of the quiet run."""

from collections import Counter

import pytest
from forest_outcome import differences, leftovers, outcome
from killed_runs import Aim, KilledRun, btm_command, table

from btm.forest import Forest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(420)]

LOCAL_AIMS = Counter(
    {
        Aim("driver", "random"): 2,
        Aim("driver", "checkpoint"): 1,
        Aim("driver", "manifest"): 3,
        Aim("driver", "merge"): 1,
        Aim("worker", "random"): 6,
        Aim("worker", "checkpoint"): 7,
        Aim("worker", "result"): 2,
        Aim("worker", "merge"): 3,
        Aim("fork server", "random"): 2,
    }
)
RAY_AIMS = Counter(
    {
        Aim("driver", "random"): 1,
        Aim("worker", "checkpoint"): 2,
        Aim("actor", "random"): 2,
        Aim("actor", "checkpoint"): 1,
        Aim("raylet", "random"): 1,
        Aim("worker", "merge"): 1,
    }
)


def assert_same(reference, run):
    found = differences(outcome(reference), outcome(run.forest))
    assert not found, "\n".join(found)
    assert leftovers(run.forest) == []
    assert Forest.open(run.forest).damages() == []


def test_r1_killed_local_runs_end_with_the_same_bits(reference, tmp_path, arguments, env, generator):
    forest = tmp_path / "forest"
    run = KilledRun(btm_command(*arguments, f"forest={forest}"), forest, env, list(LOCAL_AIMS.elements()), generator)
    run.run()
    print("\n" + table(run))
    assert sum(cost.kills for cost in run.costs.values()) >= 20
    assert_same(reference, run)


@pytest.mark.ray
def test_r1_killed_ray_runs_end_with_the_same_bits(reference, tmp_path, arguments, env, generator):
    forest = tmp_path / "forest"
    command = btm_command(*arguments, "launch=ray", f"forest={forest}")
    run = KilledRun(command, forest, env, list(RAY_AIMS.elements()), generator)
    run.run()
    print("\n" + table(run))
    assert sum(cost.kills for cost in run.costs.values()) >= 5
    assert_same(reference, run)
