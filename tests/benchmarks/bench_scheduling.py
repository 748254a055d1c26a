"""Scheduling at scale, in simulated time: how close many ELMs on many failing groups come to the ideal.

Run: ``python tests/benchmarks/bench_scheduling.py``. The orchestrator and its files are real, clock and trainings are
simulated (see ``simulated_cluster.py``). Efficiency is a lower bound of the time, without failures and with a driver
that costs nothing, over the simulated time. The driver's own cost is real time over trained ELMs.
"""

import argparse
import tempfile
from pathlib import Path

from simulated_cluster import Account, Trial, simulate
from speed_table import Line, close

_HOUR = 3600.0
TRIALS = {
    "64 ELMs on 64 groups": Trial(num_elms=64, num_groups=64),
    "64 ELMs on 64 groups, each failing every 24 h": Trial(num_elms=64, num_groups=64, between_failures_s=24 * _HOUR),
    "1,000 ELMs on 1,000 groups, each failing every 24 h": Trial(
        num_elms=1000, num_groups=1000, between_failures_s=24 * _HOUR
    ),
}


def show(what: str, account: Account) -> None:
    """Print one trial."""
    tasks = account.joined + account.failures
    print(
        f"{what:<52} efficiency {account.efficiency:.3f}, {account.makespan_s / _HOUR:.2f} h (ideal "
        f"{account.ideal_s / _HOUR:.2f} h), {account.failures} failures, {account.lost_s / _HOUR:.1f} h done twice, "
        f"driver {account.driver_s:.1f} s = {1000 * account.driver_s / tasks:.0f} ms per task, longest look "
        f"{account.longest_look_s:.2f} s",
        flush=True,
    )


def main() -> None:
    """Simulate and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the small trials only")
    options = parser.parse_args()
    lines = []
    for what, trial in TRIALS.items():
        if options.quick and trial.num_elms > 64:
            continue
        with tempfile.TemporaryDirectory(prefix="bench-") as folder:
            account = simulate(trial, Path(folder))
        show(what, account)
        assert account.joined == trial.num_elms
        lines.append(Line(what=f"efficiency: {what}", figure=account.efficiency))
        cost_ms = 1000 * account.driver_s / (account.joined + account.failures)
        lines.append(Line(what=f"driver's cost per task: {what}"[:64], figure=cost_ms, unit="ms"))
    close(lines)


if __name__ == "__main__":
    main()
