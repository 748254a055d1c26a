"""The trainer against minimal hand-written loops: tokens/s of real steps, fp32 masters, metrics and checkpoints on.

``python tests/benchmarks/bench_trainer.py`` runs in turn, each as a process of its own: the real worker
(``btm.train.worker`` on real token shards) and what everybody writes first around transformers' model: under autocast
from fp32 weights, and with bf16 weights and fp32 masters. All read the same request: ``hand_written_loops.py`` has the
same initial weights, batches, schedule, clipping, fused AdamW and tuned allocator (the losses printed beside show it),
and leaves out metrics, checkpoints and checks. All processes live at the same time and take turns of a few updates, the
others stopped by a signal, so that other load on the machine meets all alike; everything that a process does in its
turns counts. The bf16 matmul peak is measured before each turn, and once by the worker itself, as it always does; the
highest counts.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path

from speed_table import Line, close
from training_turns import LENGTH, VOCABULARY, WARM_UP, Contender, prepare_text, request, turn_parser

FLOOR, GOAL, PEAK_GOAL = 0.97, 1.9, 50.0
HAND_WRITTEN = ("autocast", "bf16 weights")
"""Kinds of ``hand_written_loops.py``."""


def main() -> None:
    """Run all contenders in turn and print the table."""
    options = _options()
    with tempfile.TemporaryDirectory(prefix="bench-trainer-", dir=options.directory) as scratch:
        folder = Path(scratch)
        sources = prepare_text(folder, 1, quick=options.quick)
        spec = request(folder, "run", sources, options, checkpoint_every=options.checkpoint_every)
        spec.save(folder / "spec.json")
        load = os.getloadavg()[0]
        contenders: list[Contender] = []
        try:
            for name in ("worker", *HAND_WRITTEN):
                rows = folder / "run" / "metrics.jsonl" if name == "worker" else folder / f"{name.split()[0]}.jsonl"
                contenders.append(Contender(name, _command(name, folder, rows), rows, options))
                contenders[-1].turn(WARM_UP)
            peaks = []
            for _ in range(options.rounds):
                peaks.append(_peak(options))
                for contender in contenders:
                    contender.turn(options.turn)
            report(contenders, options, load, max(peaks))
        finally:
            for contender in contenders:
                contender.close()


def _peak(options: argparse.Namespace) -> float:
    import torch

    from btm.train.peak import matmul_peak

    if options.threads:
        torch.set_num_threads(options.threads)
    return matmul_peak(torch.bfloat16, torch.device("cpu"))


def _command(name: str, folder: Path, rows: Path) -> list[str]:
    if name == "worker":
        return [sys.executable, "-m", "btm.train.worker", str(folder / "spec.json")]
    loops = str(Path(__file__).with_name("hand_written_loops.py"))
    return [sys.executable, loops, str(folder / "spec.json"), name, str(rows)]


def report(contenders: list[Contender], options: argparse.Namespace, load: float, peak: float) -> None:
    """Print tokens/s over all turns, the fastest turn, the share of the peak and the ratios."""
    turns = {contender.name: contender.seconds[1:] for contender in contenders}
    tokens = options.sequences * LENGTH * options.turn
    rates = {name: len(seconds) * tokens / sum(seconds) for name, seconds in turns.items()}
    last = json.loads(contenders[0].rows()[-1])
    in_worker = last["train/flops_per_s"] / last["train/peak_share"]
    peak = max(peak, in_worker)
    # The trainer's own count has the full square of the scores; what causal attention needs is half of it.
    needed = last["train/flops_per_s"] / last["train/tokens_per_s"] - 6 * 6 * 384 * LENGTH
    threads = options.threads or len(os.sched_getaffinity(0))
    saved = (WARM_UP + options.rounds * options.turn) // options.checkpoint_every
    print(
        f"trainer, Llama of 6 x 384 with {VOCABULARY} tokens, {options.sequences} x {LENGTH} per update, {threads} "
        f"threads, {options.rounds} turns of {options.turn} updates, {saved} checkpoints in them; load {load:.2f} "
        f"before, {os.getloadavg()[0]:.2f} after\nbf16 matmul peak {peak / 1e9:.0f} GFLOP/s, "
        f"at the worker's start {in_worker / 1e9:.0f}"
    )
    base = max(HAND_WRITTEN, key=rates.__getitem__)
    print(f"{'':30} tokens/s   fastest  of peak   ratio   last loss")
    for contender in contenders:
        rate, fastest = rates[contender.name], tokens / min(turns[contender.name])
        loss = json.loads(contender.rows()[-1])["train/loss"]
        print(
            f"{contender.name:30} {rate:8.0f} {fastest:9.0f} {fastest * needed / peak:8.1%} {rate / rates[base]:7.2f} "
            f"{loss:11.2f}"
        )
    pairs = sorted(theirs / ours for ours, theirs in zip(turns["worker"], turns[base], strict=True))
    print(f"ratio of single turns: median {statistics.median(pairs):.2f}, {pairs[0]:.2f} to {pairs[-1]:.2f}")
    share = 100 * tokens / min(turns["worker"]) * needed / peak
    close(
        [
            Line(what=f"trainer / {base} loop, tokens/s", figure=rates["worker"] / rates[base], floor=FLOOR, goal=GOAL),
            Line(what="trainer, share of bf16 matmul peak, fastest turn", figure=share, goal=PEAK_GOAL, unit="%"),
        ]
    )


def _options() -> argparse.Namespace:
    parser = turn_parser(__doc__, rounds=8, turn=5)
    parser.add_argument("--checkpoint-every", type=int, default=20, help="five times as often as the default of btm")
    parser.add_argument("--directory", default=None, help="where runs are written")
    options = parser.parse_args()
    if options.quick:
        options.rounds, options.turn, options.sequences = 2, 2, 2
    return options


if __name__ == "__main__":
    main()
