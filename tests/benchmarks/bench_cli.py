"""Wall-clock of commands that compute nothing, process start included, and the modules that they import.

``python tests/benchmarks/bench_cli.py`` trains a forest of two ELMs in seconds for ``btm status`` to look at, then
runs ``btm --help``, ``btm status`` and a command with a mistake in turn, beside an interpreter that does nothing.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from real_text import write_domains
from speed_table import Line, close

FLOOR_S, GOAL_S = 1.0, 0.5
HEAVY = ("torch", "transformers", "ray", "wandb", "matplotlib", "datasets", "numpy", "pandas")
NOTED = (*HEAVY, "hydra", "omegaconf", "pydantic", "rich")


def small_forest(folder: Path) -> Path:
    """A finished run."""
    domains = write_domains(folder / "text", 2, max_bytes=1_500_000)
    given = [f"data.domains.{name}={path}" for name, path in domains.items()]
    forest = folder / "forest"
    command = [*_btm(), "run", "experiment=smoke", "data.min_train_tokens=1000", *given, f"forest={forest}"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"btm run failed: {done.stderr[-2000:]}")
    return forest


def seconds_of(command: list[str], expected: int, folder: Path) -> float:
    """Wall-clock of one process."""
    began = time.perf_counter()
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - began
    if done.returncode != expected:
        raise RuntimeError(f"{command} exited with {done.returncode}, not {expected}: {done.stderr[-1000:]}")
    return seconds


def imported(arguments: list[str], folder: Path) -> tuple[int, list[str]]:
    """How many modules a command imports, and which of the large ones."""
    command = [sys.executable, "-X", "importtime", "-m", "btm.cli", *arguments]
    text = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False).stderr
    names = {line.rsplit("|", 1)[1].strip() for line in text.splitlines() if line.startswith("import time:")}
    return len(names), [name for name in NOTED if name in names]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="one round")
    options = parser.parse_args()
    options.rounds = 1 if options.quick else options.rounds
    with tempfile.TemporaryDirectory(prefix="bench-cli-") as scratch:
        folder = Path(scratch)
        forest = small_forest(folder)
        commands = {
            "btm --help": (["--help"], 0),
            "btm status": (["status", f"forest={forest}"], 0),
            "btm run, unknown key": (["run", f"forest={folder / 'new'}", "trian.tokens=3"], 2),
            "btm run, wrong value": (["run", f"forest={folder / 'new'}", "train.lr=fast"], 2),
        }
        load = os.getloadavg()[0]
        seconds: dict[str, list[float]] = {name: [] for name in commands}
        bare: list[float] = []
        for _ in range(options.rounds):
            bare.append(seconds_of([sys.executable, "-c", "pass"], 0, folder))
            for name, (arguments, code) in commands.items():
                seconds[name].append(seconds_of([*_btm(), *arguments], code, folder))
        print(f"commands, median of {options.rounds}; load {load:.2f} before, {os.getloadavg()[0]:.2f} after")
        print(f"{'':24} median s  fastest  modules  of the large ones")
        print(f"{'python -c pass':24} {statistics.median(bare):8.3f} {min(bare):8.3f}")
        for name, values in seconds.items():
            count, large = imported(commands[name][0], folder)
            note = " MUST NOT" if set(large) & set(HEAVY[:3]) else ""
            print(
                f"{name:24} {statistics.median(values):8.3f} {min(values):8.3f} "
                f"{count:8d}  {', '.join(large) or 'none'}{note}"
            )
        close(
            [
                Line(what=name, figure=statistics.median(values), floor=FLOOR_S, goal=GOAL_S, at_most=True, unit="s")
                for name, values in seconds.items()
            ]
        )


def _btm() -> list[str]:
    return [str(Path(sys.executable).with_name("btm"))]


if __name__ == "__main__":
    main()
