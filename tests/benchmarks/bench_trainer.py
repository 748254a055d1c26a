"""The trainer against minimal hand-written loops: tokens/s of real steps, fp32 masters, metrics and checkpoints on.

``python tests/benchmarks/bench_trainer.py`` runs in turn, each as a process of its own: the real worker
(``btm.train.worker`` on real token shards) and what everybody writes first around transformers' model: under autocast
from fp32 weights, and with bf16 weights and fp32 masters. All have the same model, batches, fused AdamW, clipping and
tuned allocator; the hand-written loops write no metrics and no checkpoints. The worker is timed by the wall-clock of
its metrics rows, so that everything between two updates counts; its peak is measured by the worker itself.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path

import numpy as np
from real_text import write_domains

from btm.config import DataConfig, EngineConfig, ModelConfig, TokenizerConfig, TrainConfig
from btm.records import PrepareSpec, Start, TokenSource, TrainSpec

VOCABULARY = 32_000
LENGTH = 512
LOG_EVERY = 5
FLOOR, GOAL = 0.97, 1.9
HAND_WRITTEN = ("autocast", "bf16 weights")
DEFAULT_CHECKPOINT_EVERY = TrainConfig().checkpoint_every


def main() -> None:
    """Run all contenders in turn and print the table."""
    options = _options()
    if options.contender:
        hand_written(options)
        return
    with tempfile.TemporaryDirectory(prefix="bench-trainer-", dir=options.directory) as scratch:
        folder = Path(scratch)
        prefix = prepare_text(folder)
        load = os.getloadavg()[0]
        rounds = [
            (worker_round(folder, prefix, number, options), [hand_round(k, prefix, options) for k in HAND_WRITTEN])
            for number in range(options.rounds)
        ]
        report(rounds, options, load)


def prepare_text(folder: Path) -> Path:
    """Token shards of the standard library's sources; returns the prefix of the training split."""
    from btm.corpus.worker import prepare

    paths = write_domains(folder / "text", 1, max_bytes=12_000_000)
    prepare(
        PrepareSpec(
            output_dir=str(folder / "corpus"),
            tokenizer_dir=str(folder / "tokenizer"),
            data=DataConfig(domains={name: str(path) for name, path in paths.items()}),
            tokenizer=TokenizerConfig(vocab_size=VOCABULARY),
        )
    )
    return folder / "corpus" / "part0" / "train"


def worker_round(folder: Path, prefix: Path, number: int, options: argparse.Namespace) -> dict[str, float]:
    """One training by the worker; the first row's updates are warm-up.

    Returns:
        tokens/s over everything, tokens/s of updates alone, seconds of one checkpoint with metrics, FLOP/s peak, loss.
    """
    output, updates = folder / f"run{number}", LOG_EVERY + options.updates
    spec = TrainSpec(
        name="bench",
        output_dir=str(output),
        start=Start(kind="scratch"),
        sources=[TokenSource(domain="part0", prefix=str(prefix))],
        last_update=updates,
        total_updates=updates,
        batch_sequences=options.sequences,
        tokenizer_dir=str(folder / "tokenizer"),
        model=ModelConfig(num_layers=6),
        train=TrainConfig(
            sequence_length=LENGTH,
            batch_tokens=options.sequences * LENGTH,
            log_every=LOG_EVERY,
            checkpoint_every=options.updates,
        ),
        engine=EngineConfig(),
    )
    spec.save(folder / f"spec{number}.json")
    _run([sys.executable, "-m", "btm.train.worker", str(folder / f"spec{number}.json")], options)
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    wall = rows[-1]["time"] - rows[0]["time"]
    window = LOG_EVERY * options.sequences * LENGTH
    updating = sum(window / row["train/tokens_per_s"] for row in rows[1:])
    tokens = options.updates * options.sequences * LENGTH
    return {
        "tokens_per_s": tokens / wall,
        "updates_only": tokens / updating,
        "between": wall - updating,
        "peak": rows[-1]["train/flops_per_s"] / rows[-1]["train/peak_share"],
        "flops_per_token": rows[-1]["train/flops_per_s"] / rows[-1]["train/tokens_per_s"],
        "loss": rows[-1]["train/loss"],
    }


def hand_round(contender: str, prefix: Path, options: argparse.Namespace) -> dict[str, float]:
    """One training by a hand-written loop in a process of its own."""
    command = [sys.executable, __file__, "--contender", contender, "--prefix", str(prefix)]
    command += ["--sequences", str(options.sequences), "--updates", str(max(5, options.updates // 2))]
    return json.loads(_run(command, options))


def hand_written(options: argparse.Namespace) -> None:
    """Train and print tokens/s and loss as JSON; this is the child process."""
    import torch

    from btm.model.allocator import tune_allocator
    from btm.model.causal_lm import build_model

    tune_allocator()
    torch.set_num_threads(options.threads or len(os.sched_getaffinity(0)))
    model = build_model(ModelConfig(num_layers=6), vocab_size=VOCABULARY, eos_id=0, seed=0)
    is_autocast = options.contender == "autocast"
    step = _autocast_step(model) if is_autocast else _master_step(model)
    losses, began = [], 0.0
    for number, (inputs, targets) in enumerate(_batches(options)):
        if number == LOG_EVERY:
            began = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16) if is_autocast else nullcontext():
            logits = model(input_ids=inputs, use_cache=False).logits
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
        loss.backward()
        step()
        losses.append(loss.item())
    tokens = (len(losses) - LOG_EVERY) * options.sequences * LENGTH
    print(json.dumps({"tokens_per_s": tokens / (time.perf_counter() - began), "loss": losses[-1]}))


def _batches(options: argparse.Namespace) -> Iterator[tuple]:
    import torch

    ids = np.memmap(f"{options.prefix}.bin", dtype=np.uint16, mode="r")
    size = options.sequences * LENGTH
    for number in range(LOG_EVERY + options.updates):
        part = torch.from_numpy(ids[number * size : (number + 1) * size + 1].astype(np.int64))
        yield part[:-1].view(-1, LENGTH), part[1:].view(-1, LENGTH)


def _autocast_step(model) -> Callable[[], None]:
    import torch

    optimizer = _adamw(model.parameters())

    def step() -> None:
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def _master_step(model) -> Callable[[], None]:
    import torch

    weights = list(model.parameters())
    masters = [torch.nn.Parameter(weight.detach().clone()) for weight in weights]
    for weight in weights:
        weight.data = weight.data.bfloat16()
    optimizer = _adamw(masters)

    def step() -> None:
        for weight, master in zip(weights, masters, strict=True):
            master.grad, weight.grad = weight.grad.float(), None
        torch.nn.utils.clip_grad_norm_(masters, 1.0)
        optimizer.step()
        with torch.no_grad():
            for weight, master in zip(weights, masters, strict=True):
                weight.copy_(master)

    return step


def _adamw(weights):
    import torch

    return torch.optim.AdamW(weights, lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True)


def report(rounds: list, options: argparse.Namespace, load: float) -> None:
    """Print medians and fastest rounds, and the ratio of the medians."""
    ours = {key: [worker[key] for worker, _ in rounds] for key in rounds[0][0]}
    hand = {
        name: [contenders[index]["tokens_per_s"] for _, contenders in rounds] for index, name in enumerate(HAND_WRITTEN)
    }
    best = max(hand, key=lambda name: statistics.median(hand[name]))
    # At the default interval, from the same measurement: updates as they were, what is between them spread wider.
    tokens = options.sequences * LENGTH
    default = [
        tokens / (tokens / fast + between / max(options.updates, DEFAULT_CHECKPOINT_EVERY))
        for fast, between in zip(ours["updates_only"], ours["between"], strict=True)
    ]
    peak = max(ours["peak"])
    needed = statistics.median(ours["flops_per_token"]) - 6 * 6 * 384 * LENGTH
    threads = options.threads or len(os.sched_getaffinity(0))
    print(
        f"trainer, Llama of 6 x 384 with {VOCABULARY} tokens, {options.sequences} x {LENGTH} per update, {threads} "
        f"threads, {len(rounds)} rounds in turn; load {load:.2f} before, {os.getloadavg()[0]:.2f} after\n"
        f"bf16 matmul peak in the worker {peak / 1e9:.0f} GFLOP/s (lowest round {min(ours['peak']) / 1e9:.0f}); "
        f"shares count causal attention once"
    )
    contenders = {
        f"worker, a checkpoint every {options.updates} updates": ours["tokens_per_s"],
        f"worker, a checkpoint every {DEFAULT_CHECKPOINT_EVERY} (default)": default,
        "worker, updates alone": ours["updates_only"],
        **{f"hand-written, {name}": values for name, values in hand.items()},
    }
    print(f"{'':44} median t/s   fastest  of peak   ratio")
    base = statistics.median(hand[best])
    for name, values in contenders.items():
        middle = statistics.median(values)
        print(f"{name:44} {middle:10.0f} {max(values):9.0f} {middle * needed / peak:8.1%} {middle / base:7.2f}")
    pairs = [value / max(c["tokens_per_s"] for c in pair) for value, (_, pair) in zip(default, rounds, strict=True)]
    print(f"between updates: {statistics.median(ours['between']):.2f} s for one checkpoint and all metrics")
    print(
        f"last loss: worker {ours['loss'][-1]:.2f}, "
        + ", ".join(f"{n} {c['loss']:.2f}" for n, c in zip(HAND_WRITTEN, rounds[-1][1], strict=True))
    )
    print(
        f"ratio of the medians {statistics.median(default) / base:.2f}, per round "
        f"{', '.join(f'{pair:.2f}' for pair in pairs)} (floor {FLOOR}, goal {GOAL}; peak share goal 50%)"
    )


def _run(command: list[str], options: argparse.Namespace) -> str:
    environment = dict(os.environ)
    if options.threads:
        environment["OMP_NUM_THREADS"] = str(options.threads)
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise RuntimeError(f"{command[1:4]} failed: {done.stderr[-2000:]}")
    return done.stdout


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--updates", type=int, default=20, help="updates measured per round, a multiple of 5")
    parser.add_argument("--sequences", type=int, default=8, help="sequences per update")
    parser.add_argument("--threads", type=int, default=0, help="0 takes all cores")
    parser.add_argument("--directory", default=None, help="where runs are written")
    parser.add_argument("--contender", default="", help=argparse.SUPPRESS)
    parser.add_argument("--prefix", default="", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
