"""Start of one more training: fork server, fresh interpreter, Ray actors, and a Ray Train ``fit()`` that does nothing.

Run: ``python tests/benchmarks/bench_start.py``. Each figure is the time from asking to the first line of the
task's own code, with torch and transformers imported; the parent is up already. For Ray Train it is a ``fit()`` of one
worker whose loop does nothing, on a Ray that runs already; ``import torch`` alone is printed beside. The contenders
take turns; minima are compared.
"""

import argparse
import logging
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from speed_table import Line, close

from launch.local import LocalExecutor
from launch.ray_executor import RayExecutor
from launch.task import Executor, Task

# Exactly what a worker needs before its first own line.
PROGRAM = """
import sys, time
import torch, transformers
from transformers import AutoModelForCausalLM
with open(sys.argv[1] + ".part", "w") as file:
    file.write(str(time.time()))
import os
os.rename(sys.argv[1] + ".part", sys.argv[1])
"""
PRELOAD = (
    "torch",
    "transformers",
    "transformers.models.llama.modeling_llama",
    "transformers.models.auto.modeling_auto",
)


def start_once(executor: Executor, folder: Path, name: str, env: dict[str, str]) -> float:
    """Seconds from submission to the task's first own line."""
    arguments = (str(folder / name),)
    begin = time.time()
    executor.submit(
        Task(name=name, module="start_program", arguments=arguments, env=env, log_path=folder / f"{name}.log")
    )
    while not executor.poll()[name].is_final:
        time.sleep(0.001)
    return float((folder / name).read_text(encoding="utf-8")) - begin


def interpreter_once(code: str) -> float:
    """Seconds that a fresh interpreter takes for ``code``, start and end included."""
    begin = time.time()
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    return time.time() - begin


def ray_train_once(folder: Path) -> float:
    """Seconds of a ``fit()`` that does nothing."""
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    begin = time.time()
    TorchTrainer(
        do_nothing, scaling_config=ScalingConfig(num_workers=1), run_config=RunConfig(storage_path=str(folder))
    ).fit()
    return time.time() - begin


def do_nothing() -> None:
    """The loop of a training that trains nothing."""


def measure(rounds: int, folder: Path) -> dict[str, list[float]]:
    """Every contender ``rounds`` times, taking turns."""
    times: dict[str, list[float]] = {}
    fresh = {"PYTHONHASHSEED": "0"}  # read at interpreter start, so the executor must start one
    with LocalExecutor(preload=PRELOAD) as local, RayExecutor(num_cpus=4, preload=PRELOAD) as ray_executor:
        start_once(local, folder, "warm", {})
        for index in range(rounds):
            contenders: dict[str, Callable[[], float]] = {
                "fork server": lambda index=index: start_once(local, folder, f"fork{index}", {}),
                "fresh interpreter": lambda index=index: start_once(local, folder, f"fresh{index}", fresh),
                "python -c 'import torch'": lambda: interpreter_once("import torch"),
                "Ray actor, new": lambda index=index: start_once(ray_executor, folder, f"ray{index}", {}),
                "Ray Train fit()": lambda: ray_train_once(folder),
            }
            for name, run in contenders.items():
                times.setdefault(name, []).append(run())
    return times


def main() -> None:
    """Print the times and the ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="one round")
    options = parser.parse_args()
    rounds = 1 if options.quick else options.rounds
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory() as path:
        folder = Path(path)
        (folder / "start_program.py").write_text(PROGRAM, encoding="utf-8")
        sys.path.insert(0, str(folder))
        load = os.getloadavg()[0]
        times = measure(rounds, folder)
    best = min(times["fork server"])
    print(f"start of one more task, {rounds} rounds; load average {load:.1f} before, {os.getloadavg()[0]:.1f} after")
    for name, seconds in times.items():
        print(f"{name:26} {min(seconds):8.3f} s (max {max(seconds):.3f}) {min(seconds) / best:8.1f} x fork server")
    ratio = min(times["Ray Train fit()"]) / best
    close([Line(what="start of one more ELM: Ray Train fit() / fork server", figure=ratio, floor=5, goal=100)])


if __name__ == "__main__":
    main()
