"""What a forest costs beyond its trainings, and what two ELMs side by side give beside one model on the same cores.

``python tests/benchmarks/bench_run.py`` (about five minutes; ``--quick`` one) measures:

* N ELMs by ``btm run``, from the start of the command to the last ELM in the forest, against the same requests given
  to the bare worker, each pinned to one core, as many at a time as there are groups. The bare trainings run half
  before and half after. Corpus and seed model are there before, so that nothing but ELMs runs in the measured time.
* two ELMs side by side, one core each, against one model on both cores with twice the batch: data parallel over two
  processes, and one process of two threads. Tokens/s of updates alone.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from real_text import write_domains
from rich.console import Console
from speed_table import Line, close

from btm.config import Config
from btm.config_parse import config_to_dict, parse_config
from btm.plan import plan_run
from btm.records import TrainResult
from btm.requests import TrainSpec
from btm.session import execute, make_context, plan_input
from btm.step_context import Context
from btm.step_specs import build_spec

GROUPS = 2
UPDATE_TOKENS = 2048
LONG_ENOUGH_S = 60
RUN_FLOOR, RUN_GOAL, SIDE_GOAL = 1.1, 1.02, 1.1


def main() -> None:
    """Run both comparisons."""
    options = _options()
    with tempfile.TemporaryDirectory(prefix="bench-run-", dir=options.directory) as scratch:
        folder, began = Path(scratch), os.getloadavg()[0]
        config = configuration(folder, options)
        context = seeded_forest(config)
        specs = elm_specs(context, config)
        print(f"{len(specs)} ELMs of {options.updates} updates of {UPDATE_TOKENS} tokens, {GROUPS} groups", flush=True)
        lines = [bench_forest(folder, config, specs), *bench_side_by_side(folder, specs[:2], options)]
        print(f"load {began:.2f} before, {os.getloadavg()[0]:.2f} after")
        close(lines)


def configuration(folder: Path, options: argparse.Namespace) -> Config:
    """A forest of which nearly all is ELMs: two updates of seed phase, the smallest evaluation."""
    texts = write_domains(folder / "text", options.elms, max_bytes=2_000_000)
    total = options.updates + 2
    raw = config_to_dict(Config())
    raw["forest"] = str(folder / "forest")
    raw["data"] |= {"domains": {name: str(path) for name, path in texts.items()}, "min_train_tokens": 1000}
    raw["data"] |= {"dev_fraction": 0.1, "test_fraction": 0.1}
    raw["train"] |= {"batch_tokens": UPDATE_TOKENS * options.elms, "tokens": UPDATE_TOKENS * options.elms * total}
    raw["train"] |= {"seed_fraction": 2 / total, "eval_tokens": 2048}
    raw["evaluate"] |= {"max_tokens": 256, "bootstrap_samples": 10}
    raw["launch"] |= {"num_groups": GROUPS}
    return parse_config(raw)


def seeded_forest(config: Config) -> Context:
    """Prepare the corpus and train the seed model, as ``btm run`` does."""
    domains = list(config.data.domains)
    context = make_context(config, domains, [])
    context.forest_dir.mkdir(parents=True)
    with open(os.devnull, "w", encoding="utf-8") as silence:
        execute(plan_run(plan_input(config, domains, []))[:2], context, Console(file=silence))
    return context


def elm_specs(context: Context, config: Config) -> list[TrainSpec]:
    """The requests that ``btm run`` will give to its workers."""
    steps = plan_run(plan_input(config, context.domains, []))
    built = [build_spec(step, context) for step in steps if step.name.startswith("elm/")]
    return [spec for spec in built if isinstance(spec, TrainSpec)]


def bench_forest(folder: Path, config: Config, specs: list[TrainSpec]) -> Line:
    """Wall-clock of the ELMs under ``btm run`` against bare workers."""
    half = (len(specs) // 2 + GROUPS - 1) // GROUPS * GROUPS
    bare = bare_trainings(folder / "bare", specs[:half])
    ours, elm_seconds = run_forest(folder, config, len(specs))
    bare += bare_trainings(folder / "bare", specs[half:])
    whole, updates = sum(whole for whole, _ in bare) / GROUPS, sum(updates for _, updates in bare) / GROUPS
    inside = sum(elm_seconds) / GROUPS
    shortest = min(seconds for seconds, _ in bare)
    if shortest < LONG_ENOUGH_S:
        print(
            f"the shortest training took {shortest:.0f} s: the ratio counts from {LONG_ENOUGH_S} s on, give --updates"
        )
    print(f"btm run, command to last ELM          {ours:8.1f} s   load {os.getloadavg()[0]:.2f}")
    print(f"bare workers, process / groups        {whole:8.1f} s   {[round(seconds, 1) for seconds, _ in bare]}")
    print(f"bare workers, updates alone / groups  {updates:8.1f} s   (inside btm run {inside:.1f} s)")
    print(f"ratio to bare workers                 {ours / whole:8.3f}")
    print(f"ratio to their updates alone          {ours / updates:8.3f}")
    print(
        f"ratio to updates inside btm run       {ours / inside:8.3f}     (same moments, so free of other load)",
        flush=True,
    )
    what = f"btm run, {len(specs)} ELMs / sum of bare trainings / {GROUPS} groups"
    return Line(what=what, figure=ours / whole, floor=RUN_FLOOR, goal=RUN_GOAL, at_most=True)


def bare_trainings(folder: Path, specs: list[TrainSpec]) -> list[tuple[float, float]]:
    """Train directly, ``GROUPS`` at a time, each on a core of its own; returns seconds of process and of updates."""
    taken = []
    for begin in range(0, len(specs), GROUPS):
        group = [_elsewhere(spec, folder / spec.name) for spec in specs[begin : begin + GROUPS]]
        taken += list(zip(run_together(group), [_result(spec).ledger.seconds for spec in group], strict=True))
    return taken


def run_together(specs: Sequence[TrainSpec]) -> list[float]:
    """Run workers at the same time, each pinned to one core; returns the seconds of each process."""
    cores = sorted(os.sched_getaffinity(0))
    began, taken = time.perf_counter(), {}
    running = {spec.name: _start(spec, {cores[index % len(cores)]}) for index, spec in enumerate(specs)}
    while len(taken) < len(running):
        for name, process in running.items():
            if name not in taken and process.poll() is not None:
                _check(process)
                taken[name] = time.perf_counter() - began
        time.sleep(0.02)
    return [taken[spec.name] for spec in specs]


def run_forest(folder: Path, config: Config, count: int) -> tuple[float, list[float]]:
    """``btm run`` until its manifest holds every ELM; returns seconds, and those of each ELM's updates."""
    forest = Path(config.forest)
    command = [str(Path(sys.executable).with_name("btm")), "run", *_overrides(config)]
    began = time.time()
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"btm run failed: {done.stderr[-2000:]}")
    manifest = json.loads((forest / "forest.json").read_text(encoding="utf-8"))
    if len(manifest["elms"]) != count:
        raise RuntimeError(f"the forest has {len(manifest['elms'])} ELMs, not {count}")
    return (forest / "forest.json").stat().st_mtime - began, [elm["ledger"]["seconds"] for elm in manifest["elms"]]


def _overrides(config: Config) -> list[str]:
    plain = config_to_dict(Config())
    given = config_to_dict(config)
    found = [f"forest={config.forest}"]
    for part in ("data", "train", "evaluate", "launch"):
        for key, value in given[part].items():
            if key == "domains":
                found += [f"data.domains.{name}={path}" for name, path in value.items()]
            elif value != plain[part][key]:
                found.append(f"{part}.{key}={value}")
    return found


def bench_side_by_side(folder: Path, specs: Sequence[TrainSpec], options: argparse.Namespace) -> list[Line]:
    """Tokens/s of two ELMs and of one model, in turn."""
    rates: dict[str, list[float]] = {}
    names = ("two ELMs, one core each", "one model, two processes", "one model, two threads")
    for number in range(options.rounds):
        short = [_shortened(spec, folder / f"side{number}" / spec.name, options.side_updates) for spec in specs]
        run_together(short)
        rates.setdefault(names[0], []).append(sum(_rate(spec) for spec in short))
        for name, processes in ((names[1], 2), (names[2], 1)):
            double = _doubled(short[0], folder / f"side{number}" / f"double{processes}", processes)
            _run_double(double, processes)
            rates.setdefault(name, []).append(_rate(double))
    print(f"\ntokens/s of updates, {options.side_updates} updates, {options.rounds} rounds in turn")
    for name, values in rates.items():
        print(f"{name:28} {statistics.median(values):9.0f}   fastest {max(values):9.0f}")
    lines = []
    for name in names[1:]:
        ratios = [ours / theirs for ours, theirs in zip(rates[names[0]], rates[name], strict=True)]
        what = f"two ELMs side by side / {name}, tokens/s"
        lines.append(Line(what=what, figure=statistics.median(ratios), goal=SIDE_GOAL))
    return lines


def _shortened(spec: TrainSpec, output: Path, updates: int) -> TrainSpec:
    last = min(spec.last_update, spec.first_update + updates)
    return _elsewhere(spec, output).model_copy(update={"last_update": last})


def _doubled(spec: TrainSpec, output: Path, processes: int) -> TrainSpec:
    engine = spec.engine.model_copy(update={"num_processes": processes})
    changes = {"batch_sequences": 2 * spec.batch_sequences, "engine": engine, "name": output.name}
    return _elsewhere(spec, output).model_copy(update=changes)


def _run_double(spec: TrainSpec, processes: int) -> None:
    cores = sorted(os.sched_getaffinity(0))[:2]
    if processes == 1:
        _check(_start(spec, set(cores), threads=2))
        return
    meeting = f"{spec.output_dir}.rendezvous"
    group = [
        _start(spec, {core}, RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", RENDEZVOUS_FILE=meeting)
        for rank, core in enumerate(cores)
    ]
    for process in group:
        _check(process)


def _elsewhere(spec: TrainSpec, output: Path) -> TrainSpec:
    shutil.rmtree(output, ignore_errors=True)
    return spec.model_copy(update={"output_dir": str(output)})


def _start(spec: TrainSpec, cores: set[int], *, threads: int = 1, **environment: str) -> subprocess.Popen[str]:
    path = Path(f"{spec.output_dir}.spec.json")
    if environment.get("RANK", "0") == "0":
        path.parent.mkdir(parents=True, exist_ok=True)
        spec.save(path)
    return subprocess.Popen(
        [sys.executable, "-m", "btm.train.worker", str(path)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": str(threads), **environment},
        preexec_fn=lambda: os.sched_setaffinity(0, cores),
    )


def _check(process: subprocess.Popen[str]) -> None:
    _, errors = process.communicate()
    if process.returncode:
        raise RuntimeError(f"a worker exited with {process.returncode}: {errors[-2000:]}")


def _result(spec: TrainSpec) -> TrainResult:
    return TrainResult.load(Path(spec.output_dir) / "result.json")


def _rate(spec: TrainSpec) -> float:
    ledger = _result(spec).ledger
    return ledger.tokens / ledger.seconds


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one minute: trainings too short for the ratio to count")
    parser.add_argument("--elms", type=int, default=4)
    parser.add_argument("--updates", type=int, default=None, help="updates of one ELM (default 300; quick: 30)")
    parser.add_argument(
        "--side-updates", type=int, default=None, help="of the second comparison (default 60; quick: 10)"
    )
    parser.add_argument("--rounds", type=int, default=None, help="of the second comparison (default 2; quick: 1)")
    parser.add_argument("--directory", default=None, help="where runs are written")
    options = parser.parse_args()
    for name, full, quick in (("updates", 300, 30), ("side_updates", 60, 10), ("rounds", 2, 1)):
        if getattr(options, name) is None:
            setattr(options, name, quick if options.quick else full)
    return options


if __name__ == "__main__":
    main()
