"""Forward and backward of a 23M Llama on a CPU, against hand-written loops and against bare matrix products.

``python tests/benchmarks/bench_trainer_math.py`` prints ratios; contenders take turns within one process, with the
allocator tuned for all of them, and each ratio is of the fastest rounds. The hand-written loops are transformers'
model as it comes: under autocast from fp32 weights, and with bf16 weights (fp32 masters are the optimizer's affair and
cost all contenders the same). Shares of the peak count the FLOPs that are needed: half of the attention square.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext

import torch
from speed_table import Line, close
from torch.nn import functional
from transformers import PreTrainedModel

from btm.config_model import ModelConfig
from btm.model import native
from btm.model.allocator import tune_allocator
from btm.model.causal_lm import build_model, flops_per_token, num_parameters
from btm.model.loss import loss_sum, token_losses
from btm.model.patches import prepare_for_training
from btm.train.peak import matmul_peak

Batch = tuple[torch.Tensor, torch.Tensor]


def make_model(options: argparse.Namespace) -> PreTrainedModel:
    """The same random Llama for every contender."""
    config = ModelConfig(num_layers=6, hidden_size=384, num_heads=6, intermediate_size=1024, max_positions=2048)
    return build_model(config, vocab_size=options.vocab, eos_id=0, seed=0)


def hand_written(options: argparse.Namespace, batch: Batch, *, autocast: bool) -> Callable[[], None]:
    """What everybody writes first."""
    model = make_model(options)
    if not autocast:
        prepare_for_training(model, "cpu", torch.bfloat16).undo()

    def run() -> None:
        model.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
            logits = model(input_ids=batch[0], use_cache=False).logits
            loss = functional.cross_entropy(logits.flatten(0, 1), batch[1].flatten())
        loss.backward()

    return run


def ours(options: argparse.Namespace, batch: Batch, *, compiled: bool = True) -> Callable[[], None]:
    """The calls of the trainer."""
    model = make_model(options)
    prepare_for_training(model, "cpu", torch.bfloat16)
    build = native.kernels

    def run() -> None:
        model.zero_grad(set_to_none=True)
        native.kernels = build if compiled else lambda: None
        try:
            loss_sum(model, *batch).backward()
        finally:
            native.kernels = build

    return run


def linear_products(weight: torch.Tensor, inputs: torch.Tensor, grads: torch.Tensor | None, backward: bool) -> None:
    """What a linear layer multiplies."""
    outputs = torch.mm(inputs, weight.t())
    if backward:
        grads = outputs if grads is None else grads
        torch.mm(grads, weight)
        torch.mm(grads.t(), inputs)


def attention_products(states: torch.Tensor, backward: bool) -> None:
    """What one attention layer multiplies, the upper triangle left out in four blocks; ``states`` [N, T, D]."""
    quarter = states.shape[1] // 4
    for end in range(quarter, states.shape[1] + 1, quarter):
        rows, seen = states[:, end - quarter : end], states[:, :end]
        scores = torch.bmm(rows, seen.transpose(1, 2))
        torch.bmm(scores, seen)
        if backward:
            torch.bmm(rows, seen.transpose(1, 2))
            torch.bmm(scores, seen)
            torch.bmm(scores.transpose(1, 2), rows)
            torch.bmm(scores.transpose(1, 2), rows)


def matmuls(options: argparse.Namespace, batch: Batch, *, backward: bool) -> Callable[[], None]:
    """All matrix products and nothing between them, the head in the loss's chunks."""
    model = make_model(options).bfloat16()
    weights = [module.weight.detach() for module in model.modules() if isinstance(module, torch.nn.Linear)]
    tokens, config = batch[0].numel(), model.config
    values = {size: torch.randn(tokens, size).bfloat16() for weight in weights for size in weight.shape if size < 8192}
    states = torch.randn(options.sequences * config.num_attention_heads, options.length, config.head_dim).bfloat16()
    rows = max(16, (1 << 25) // options.vocab)

    def run() -> None:
        for _ in range(config.num_hidden_layers):
            attention_products(states, backward)
        for weight in weights:
            inputs = values[weight.shape[1]]
            if weight.shape[0] in values:
                linear_products(weight, inputs, values[weight.shape[0]], backward)
            else:
                for part in inputs.split(rows):
                    linear_products(weight, part, None, backward)

    return run


def scoring(options: argparse.Namespace, batch: Batch, *, prepared: bool) -> Callable[[], None]:
    """Losses of every token, without gradients."""
    model = make_model(options).eval()
    preparation = prepare_for_training(model, "cpu", torch.bfloat16)
    if not prepared:
        preparation.undo()

    def run() -> None:
        token_losses(model, *batch)

    return run


def fastest(contenders: dict[str, Callable[[], None]], rounds: int) -> dict[str, float]:
    """Seconds of the fastest round of each contender; two rounds of warm-up."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(rounds + 2):
        for name, run in contenders.items():
            began = time.perf_counter()
            run()
            if number >= 2:
                seconds[name].append(time.perf_counter() - began)
    return {name: min(values) for name, values in seconds.items()}


def show(title: str, seconds: dict[str, float], base: str, *, tokens: int, needed: float, peak: float) -> None:
    """Print one line per contender; the ratio is the speed relative to ``base``."""
    sys.stdout.write(f"\n{title}; load {os.getloadavg()[0]:.2f}, bf16 matmul peak {peak / 1e9:.0f} GF/s\n")
    for name, value in seconds.items():
        share = needed * tokens / value / peak
        sys.stdout.write(
            f"  {name:<34} {value * 1e3:8.1f} ms {tokens / value:8.0f} tokens/s  {share:6.1%} of peak  "
            f"x {seconds[base] / value:.2f}\n"
        )


def main() -> None:
    """Run all comparisons."""
    tune_allocator()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vocab", type=int, default=32000)
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--quick", action="store_true", help="one round")
    options = parser.parse_args()
    options.rounds = 1 if options.quick else options.rounds
    torch.set_num_threads(options.threads)
    ids = torch.randint(0, options.vocab, (options.sequences, options.length + 1))
    batch = (ids[:, :-1].contiguous(), ids[:, 1:].contiguous())
    model = make_model(options)
    config = model.config
    needed = flops_per_token(model, options.length)
    needed -= 6 * config.num_hidden_layers * config.hidden_size * options.length
    tokens, peak = batch[0].numel(), matmul_peak(torch.bfloat16, torch.device("cpu"))
    sys.stdout.write(f"Llama of {num_parameters(model) / 1e6:.1f}M, {tokens} tokens, {options.threads} threads\n")
    training = {
        "hand-written, autocast": hand_written(options, batch, autocast=True),
        "hand-written, bf16 weights": hand_written(options, batch, autocast=False),
        "ours": ours(options, batch),
        "ours without a compiler": ours(options, batch, compiled=False),
        "bare matrix products": matmuls(options, batch, backward=True),
    }
    seconds = fastest(training, options.rounds)
    base = min(list(seconds)[:2], key=seconds.__getitem__)
    show("forward and backward", seconds, base, tokens=tokens, needed=needed, peak=peak)
    evaluating = {
        "bare matrix products": matmuls(options, batch, backward=False),
        "token_losses, prepared": scoring(options, batch, prepared=True),
        "token_losses, as loaded": scoring(options, batch, prepared=False),
    }
    seconds = fastest(evaluating, options.rounds)
    show("scoring", seconds, "bare matrix products", tokens=tokens, needed=needed / 3, peak=peak)
    ratio = seconds["token_losses, prepared"] / seconds["bare matrix products"]
    close([Line(what="score: one model of 23M / its bare matrix products", figure=ratio, goal=1.3, at_most=True)])


if __name__ == "__main__":
    main()
