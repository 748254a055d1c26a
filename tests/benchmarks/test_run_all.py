"""`make bench` runs everything, whatever fails, and judges figures by their floors and goals."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
GOOD = """
import os, sys
from speed_table import Line, close
print("arguments", sys.argv[1:], "cores", len(os.sched_getaffinity(0)))
ours, theirs = dict(figure=2.5, floor=3, goal=8), dict(figure=0.4, floor=1, goal=0.5, at_most=True)
close([Line(what="merge", **ours), Line(what="start", **theirs)])
"""


@pytest.fixture
def folder(tmp_path) -> Path:
    for name in ("run_all.py", "speed_table.py"):
        shutil.copy(HERE / name, tmp_path)
    (tmp_path / "bench_good.py").write_text(GOOD)
    return tmp_path


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(folder / "run_all.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_a_failing_benchmark_hides_no_other(folder):
    (folder / "bench_broken.py").write_text("raise SystemExit(3)")
    done = run(folder)
    assert done.returncode == 1
    assert "FAILED bench_broken.py: exit code 3" in done.stdout
    closing = done.stdout[done.stdout.index("== all,") :]
    assert "BELOW THE FLOOR" in closing
    assert "goal reached" in closing


def test_all_run_on_at_most_two_cores_and_a_missed_floor_is_no_failure(folder):
    done = run(folder, "--quick")
    assert done.returncode == 0, done.stderr
    assert "arguments ['--quick'] cores" in done.stdout
    assert int(done.stdout.split("] cores ")[1].split()[0]) <= 2


@pytest.mark.parametrize(
    ("figure", "floor", "goal", "at_most", "verdict"),
    [
        (8.0, 3.0, 8.0, False, "goal reached"),
        (7.9, 3.0, 8.0, False, "floor reached"),
        (2.9, 3.0, 8.0, False, "BELOW THE FLOOR"),
        (2.9, None, 8.0, False, "below the goal"),
        (0.5, 1.0, 0.5, True, "goal reached"),
        (1.1, 1.1, None, True, "floor reached"),
        (1.11, 1.1, 1.02, True, "BELOW THE FLOOR"),
        (None, 3.0, 8.0, False, "not measured"),
        (1.0, None, None, False, ""),
    ],
)
def test_a_figure_is_judged_by_its_limits(monkeypatch, figure, floor, goal, at_most, verdict):
    monkeypatch.syspath_prepend(str(HERE))
    from speed_table import Line

    assert Line(what="x", figure=figure, floor=floor, goal=goal, at_most=at_most).verdict == verdict
