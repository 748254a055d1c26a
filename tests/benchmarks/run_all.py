"""Run every ``bench_*.py`` beside this file, one after the other, on two cores: ``make bench``.

A benchmark that fails or hangs does not hide the others: all run, the failures are named at the end, and the exit code
is then 1. A figure below its floor is marked in the closing table but is no failure of the run: machines differ.
"""

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from speed_table import COLLECT, collected, print_table

NUM_CORES = 2
LONGEST_S = 900.0


def run(file: Path, environment: dict[str, str], arguments: list[str]) -> str:
    """Run one benchmark; returns what went wrong, or nothing."""
    process = subprocess.Popen([sys.executable, str(file), *arguments], env=environment, start_new_session=True)
    try:
        code = process.wait(LONGEST_S)
    except BaseException as error:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if isinstance(error, subprocess.TimeoutExpired):
            return f"took more than {LONGEST_S:.0f} s"
        raise
    return f"exit code {code}" if code else ""


def main() -> int:
    """Run all; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="only show that each works; the figures count for nothing")
    parser.add_argument("names", nargs="*", help="benchmarks to run, as in `run_all.py cli merge`; default: all")
    options = parser.parse_args()
    cores = sorted(os.sched_getaffinity(0))[:NUM_CORES]
    os.sched_setaffinity(0, cores)
    folder, began, failures = Path(__file__).parent, time.monotonic(), dict[str, str]()
    files = [folder / f"bench_{name}.py" for name in options.names] or sorted(folder.glob("bench_*.py"))
    with tempfile.TemporaryDirectory(prefix="bench-") as scratch:
        table = Path(scratch) / "lines.jsonl"
        environment = {**os.environ, COLLECT: str(table), "PYTHONUNBUFFERED": "1"}
        for file in files:
            started, load = time.monotonic(), os.getloadavg()[0]
            print(f"\n== {file.name}, load {load:.2f} before, {len(cores)} cores", flush=True)
            if problem := run(file, environment, ["--quick"] * options.quick):
                failures[file.name] = problem
            print(f"== {file.name}: {time.monotonic() - started:.0f} s", flush=True)
        lines = collected(table)
    print(
        f"\n== all, {(time.monotonic() - began) / 60:.1f} minutes"
        + " (quick: these figures count for nothing)" * options.quick
    )
    print_table(lines)
    for name, problem in failures.items():
        print(f"FAILED {name}: {problem}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
