"""What the engines cost: tokens/s of engine=deepspeed (ZeRO 0, 1, 2) and engine=megatron over engine=torch.

``python tests/benchmarks/bench_engines.py`` trains the same model from the same weights on the same batches under every
engine, one process and one device for all, in turns of one update, so that other load meets all alike; fp32, then bf16.
Everything of an update counts: forward, backward, clipping, AdamW. The losses printed beside show that all train alike.
Further updates are cut into phases (``engine_phases.py``), which say where an engine's time goes that engine=torch does
not need. With them stands the loop that everybody writes first around transformers' model. On a GPU the model has 125M
parameters and trains in bf16, and the share of the device's bare matrix products is printed, too. Engines whose library
is not installed are named and left out.
"""

import argparse
import gc
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from engine_phases import PHASES, PhaseClock, time_engine, timed_backward, timed_hooks
from hand_written_loops import autocast_step, master_step
from speed_table import Line, close

from btm.config_model import EngineConfig, EngineName, ModelConfig
from btm.config_train import TrainConfig
from btm.corpus.sampler import Batch
from btm.errors import TrainingError
from btm.model.allocator import tune_allocator
from btm.model.causal_lm import build_model, flops_per_token, num_parameters
from btm.train.engine import Engine
from btm.train.peak import matmul_peak_of
from btm.train.ranks import Ranks, joined_ranks
from btm.train.torch_engine import TorchEngine

TORCH, PLAIN = "torch", "plain loop"
ENGINES = {
    TORCH: {"name": "torch"},
    "deepspeed ZeRO 0": {"name": "deepspeed", "zero_stage": 0},
    "deepspeed ZeRO 1": {"name": "deepspeed", "zero_stage": 1},
    "deepspeed ZeRO 2": {"name": "deepspeed", "zero_stage": 2},
    "megatron": {"name": "megatron"},
}
WARM_UP = 2
SEED_MODEL = 1
FLOOR, GOAL = 0.85, 0.95


@dataclass(frozen=True, kw_only=True)
class Task:
    """What all contenders do."""

    model: ModelConfig
    train: TrainConfig
    vocabulary: int
    ranks: Ranks

    def batch(self, number: int) -> Batch:
        """Sequences of update ``number``."""
        rows, length = self.train.batch_tokens // self.train.sequence_length, self.train.sequence_length
        # Few different tokens, so that a loss that falls shows an optimizer at work.
        tokens = np.random.default_rng(number).integers(1, 50, size=(rows, length + 1))
        return Batch(tokens, None, {"d": rows * length})


@dataclass
class Contender:
    """One way to train the model."""

    update: Callable[[Batch], float]
    """Runs one update; returns the loss before it."""
    clock: PhaseClock
    seconds: list[float] = field(default_factory=list)
    loss: float = 0.0

    def turn(self, batch: Batch, device: torch.device, *, counts: bool) -> None:
        """One update."""
        began = now(device)
        self.loss = self.update(batch)
        if counts:
            self.seconds.append(now(device) - began)


def main() -> None:
    """Run all and print the tables."""
    options = _options()
    tune_allocator()
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # as the worker does it
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # pyright: ignore[reportAttributeAccessIssue]
    torch.set_num_threads(options.threads or len(os.sched_getaffinity(0)))
    lines: list[Line] = []
    with joined_ranks({}) as ranks:
        on_gpu = ranks.device.type == "cuda"
        for dtype in ("bf16",) if on_gpu else ("fp32", "bf16"):
            task = _task(ranks, options)
            lines += compare(task, dtype, options)
            gc.collect()
    close(lines)


def compare(task: Task, dtype: str, options: argparse.Namespace) -> list[Line]:
    """All contenders in one type of arithmetic."""
    device, load = task.ranks.device, os.getloadavg()[0]
    contenders: dict[str, Contender] = {}
    for name, engine in ENGINES.items():
        try:
            contenders[name] = _with_engine(task, EngineConfig(dtype=dtype, **engine))
        except TrainingError as error:
            print(f"{name} is left out: {error}")
    contenders[PLAIN] = _plain(task, dtype)
    for number in range(WARM_UP + options.rounds):
        for contender in contenders.values():
            contender.turn(task.batch(number), device, counts=number >= WARM_UP)
    rounds = WARM_UP + options.rounds
    for number in range(rounds, rounds + options.phase_rounds):
        for contender in contenders.values():
            with timed_backward(contender.clock), contender.clock.running():
                contender.turn(task.batch(number), device, counts=False)
    return _report(task, dtype, contenders, options, load)


def _with_engine(task: Task, config: EngineConfig) -> Contender:
    clock = PhaseClock(task.ranks.device)
    with timed_hooks(clock):
        engine = _engine(task, config)
    time_engine(engine, clock)

    def update(batch: Batch) -> float:
        gradients = engine.gradients(batch, random_seed=0, stop_requested=False)
        engine.step(task.train.lr)
        return gradients.loss

    return Contender(update, clock)


def _engine(task: Task, config: EngineConfig) -> Engine:
    model = build_model(task.model, vocab_size=task.vocabulary, eos_id=0, seed=SEED_MODEL)
    if config.name is EngineName.megatron:
        from btm.train.megatron_engine import MegatronEngine

        return MegatronEngine(model, train=task.train, config=config, ranks=task.ranks)
    if config.name is EngineName.deepspeed:
        from btm.train.deepspeed_engine import DeepSpeedEngine

        return DeepSpeedEngine(model, train=task.train, config=config, ranks=task.ranks)
    return TorchEngine(model, train=task.train, config=config, ranks=task.ranks)


def _plain(task: Task, dtype: str) -> Contender:
    """transformers' model as it comes, with the logits of all tokens; fp32 masters beside bf16 weights."""
    device = task.ranks.device
    model = build_model(task.model, vocab_size=task.vocabulary, eos_id=0, seed=SEED_MODEL).to(device).train()
    step = autocast_step(model, task.train) if dtype == "fp32" else master_step(model, task.train)

    def update(batch: Batch) -> float:
        inputs, targets = (torch.tensor(part, device=device) for part in (batch.inputs, batch.tokens[:, 1:]))
        logits = model(input_ids=inputs, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
        loss.backward()
        step(task.train.lr)
        return loss.item()

    return Contender(update, PhaseClock(device))


def _report(
    task: Task, dtype: str, contenders: dict[str, Contender], options: argparse.Namespace, load: float
) -> list[Line]:
    tokens, device = task.train.batch_tokens, task.ranks.device
    model = build_model(task.model, vocab_size=task.vocabulary, eos_id=0, seed=SEED_MODEL)
    peak = matmul_peak_of(task.ranks, torch.bfloat16 if dtype == "bf16" else torch.float32)
    needed = flops_per_token(model, task.train.sequence_length)
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    print(
        f"\nengines, Llama of {num_parameters(model) / 1e6:.1f}M, {dtype}, {tokens} tokens per update, {where}, "
        f"{options.rounds} turns of one update, {options.phase_rounds} more for the phases; load {load:.2f} before, "
        f"{os.getloadavg()[0]:.2f} after; matmul peak {peak / 1e9:.0f} GFLOP/s"
    )
    print(f"{'':18} tokens/s  of peak  ratio  of turns: median, range   last loss")
    base = contenders[TORCH].seconds
    lines = []
    for name in (*ENGINES, PLAIN):
        what = f"{name} / engine=torch, tokens/s, {dtype}"
        if name not in contenders:
            lines.append(Line(what=what, figure=None, floor=FLOOR, goal=GOAL))
            continue
        seconds = contenders[name].seconds
        rate, ratio = tokens * len(seconds) / sum(seconds), sum(base) / sum(seconds)
        pairs = sorted(theirs / ours for ours, theirs in zip(seconds, base, strict=True))
        print(
            f"{name:18} {rate:8.0f} {rate * needed / peak:8.1%} {ratio:6.3f}  {statistics.median(pairs):.3f}, "
            f"{pairs[0]:.3f} to {pairs[-1]:.3f} {contenders[name].loss:17.4f}"
        )
        if name not in (TORCH, PLAIN):
            lines.append(Line(what=what, figure=ratio, floor=FLOOR, goal=GOAL))
    _report_phases(contenders, options)
    return lines


def _report_phases(contenders: dict[str, Contender], options: argparse.Namespace) -> None:
    milliseconds = {
        name: {phase: 1e3 * contender.clock.seconds[phase] / options.phase_rounds for phase in PHASES}
        for name, contender in contenders.items()
        if name != PLAIN
    }
    print(f"\n{'ms per update':18}" + "".join(f"{phase:>16}" for phase in (*PHASES, "all")))
    for name, spent in milliseconds.items():
        print(f"{name:18}" + "".join(f"{value:16.1f}" for value in (*spent.values(), sum(spent.values()))))
    base = milliseconds.pop(TORCH)
    for name, spent in milliseconds.items():
        more = sorted(((spent[phase] - base[phase], phase) for phase in PHASES), reverse=True)
        parts = ", ".join(f"{value:+.0f} {phase}" for value, phase in more if abs(value) >= 1)
        print(f"{name}: {sum(value for value, _ in more):+.0f} ms to torch: {parts or 'less than 1 ms in each'}")


def now(device: torch.device) -> float:
    """Seconds, after all work of the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _task(ranks: Ranks, options: argparse.Namespace) -> Task:
    if ranks.device.type == "cuda":
        model, length, vocabulary = ModelConfig(num_layers=12), 1024, 32_000
    else:
        model, length, vocabulary = ModelConfig(num_layers=6), 256, 8192
    train = TrainConfig(sequence_length=length, batch_tokens=options.sequences * length, lr=1e-3)
    return Task(model=model, train=train, vocabulary=vocabulary, ranks=ranks)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--phase-rounds", type=int, default=2, help="updates that are cut into phases")
    parser.add_argument("--sequences", type=int, default=8, help="sequences per update")
    parser.add_argument("--threads", type=int, default=0, help="0 takes all cores")
    parser.add_argument("--quick", action="store_true", help="two turns of a small update")
    options = parser.parse_args()
    if options.quick:
        options.rounds, options.phase_rounds, options.sequences = 2, 1, 2
    return options


if __name__ == "__main__":
    main()
