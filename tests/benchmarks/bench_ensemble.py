"""Scoring and generating with an ensemble, against one model and against bare matrix products.

``python tests/benchmarks/bench_ensemble.py`` prints ratios; contenders take turns within one process, with the
allocator tuned for all, and each ratio is the median over the rounds. Lower is better; 1 is the ideal, 0.25 for top-2
of 8. One model scores on the same fast paths as an ensemble does, and generates as transformers wrote it. Bare matrix
products are those of the linear layers and of attention (its upper triangle left out), with the logits in pieces of
256 tokens; the ratio without attention's products is printed, too.
"""

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable

import torch
from bench_trainer_math import attention_products
from speed_table import Line, close
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from btm.config_ensemble import EnsembleConfig
from btm.corpus.windows import document_windows
from btm.ensemble.causal_lm import EnsembleForCausalLM
from btm.ensemble.likelihood import TokenDocuments, token_log_likelihoods
from btm.model.allocator import tune_allocator

NUM_ELMS = 8
TOP_K = 2
BATCH_SEQUENCES = 16


def make_model(options: argparse.Namespace, seed: int) -> PreTrainedModel:
    """A Llama with random weights in bf16."""
    torch.manual_seed(seed)
    width = options.width
    config = LlamaConfig(
        vocab_size=options.vocab,
        hidden_size=width,
        intermediate_size=width * 8 // 3 // 32 * 32,
        num_hidden_layers=options.layers,
        num_attention_heads=width // 64,
        tie_word_embeddings=True,
        eos_token_id=0,
        bos_token_id=0,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).to(torch.bfloat16).eval()


def rounds_of(contenders: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each contender in each round, after one warm-up."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(rounds + 1):
        for name, run in contenders.items():
            began = time.perf_counter()
            run()
            if number:
                seconds[name].append(time.perf_counter() - began)
    return seconds


def report(
    what: str,
    seconds: dict[str, list[float]],
    *,
    scale: float = 1.0,
    floor: float | None = None,
    goal: float | None = None,
) -> Line:
    """Print the ratio of the first contender to ``scale`` times the second."""
    (_, ours), (_, theirs) = seconds.items()
    ratio = statistics.median(one / (scale * other) for one, other in zip(ours, theirs, strict=True))
    times = f"{statistics.median(ours):7.3f} s against {scale:g} x {statistics.median(theirs):.3f} s"
    print(f"{what:<58} {ratio:6.3f}   {times}   load {os.getloadavg()[0]:.2f}", flush=True)
    return Line(what=what, figure=ratio, floor=floor, goal=goal, at_most=True)


def bare_matmuls(model: PreTrainedModel, options: argparse.Namespace, *, attention: bool = True) -> Callable[[], None]:
    """The matrix products of one forward pass over all documents, without anything between them."""
    num_tokens, config = options.documents * options.length, model.config
    shapes = [module.weight for module in model.modules() if isinstance(module, torch.nn.Linear)]
    inputs = {weight.shape[1]: torch.randn(num_tokens, weight.shape[1], dtype=torch.bfloat16) for weight in shapes}
    head = model.get_output_embeddings().weight
    heads = options.documents * config.num_attention_heads
    states = torch.randn(heads, options.length, config.head_dim, dtype=torch.bfloat16)

    def run() -> None:
        with torch.no_grad():
            for _ in range(config.num_hidden_layers if attention else 0):
                attention_products(states, backward=False)
            for weight in shapes:
                if weight is head:
                    # As scoring does: the logits of all tokens at once would be paid in page faults.
                    for piece in inputs[weight.shape[1]].split(256):
                        functional.linear(piece, weight)
                else:
                    functional.linear(inputs[weight.shape[1]], weight)

    return run


def bench_scoring(models: list[PreTrainedModel], options: argparse.Namespace) -> list[Line]:
    """Perplexity of documents."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, options.vocab, (options.documents, options.length), generator=generator).tolist()
    windows = document_windows(TokenDocuments(ids), sequence_length=options.length, eos_id=0)

    def ensemble_of(number: int, top_k: int | None = None) -> Callable[[], object]:
        prior = {str(index): 1.0 + index for index in range(number)}
        config = EnsembleConfig.model_validate({"top_k": top_k})
        ensemble = EnsembleForCausalLM(models[:number], prior=prior, ensemble=config, sequence_length=options.length)
        return lambda: ensemble.document_log_likelihoods(ids, batch_sequences=BATCH_SEQUENCES)

    def one() -> object:
        return token_log_likelihoods(models[0], windows, batch_sequences=BATCH_SEQUENCES)

    lines = []
    for number in (2, NUM_ELMS):
        seconds = rounds_of({"ensemble": ensemble_of(number), "one": one}, options.rounds)
        lines.append(report(f"score: {number} ELMs / {number} x one model", seconds, scale=number, floor=1.1))
    bare, without = bare_matmuls(models[0], options), bare_matmuls(models[0], options, attention=False)
    products = "bare matrix products"
    seconds = rounds_of({"one": one, "bare": bare}, options.rounds)
    lines.append(report(f"score: one model / its {products}", seconds, goal=1.3))
    report(
        f"score: one model / its {products} but attention's", rounds_of({"one": one, "bare": without}, options.rounds)
    )
    seconds = rounds_of({"ensemble": ensemble_of(NUM_ELMS), "bare": bare}, options.rounds)
    lines.append(report(f"score: {NUM_ELMS} ELMs / {NUM_ELMS} x {products}", seconds, scale=NUM_ELMS, goal=1.3))
    contenders = {"top": ensemble_of(NUM_ELMS, TOP_K), "all": ensemble_of(NUM_ELMS)}
    what = f"score: top-{TOP_K} of {NUM_ELMS} / all {NUM_ELMS}"
    lines.append(report(what, rounds_of(contenders, options.rounds), goal=0.30))
    return lines


def bench_generating(models: list[PreTrainedModel], options: argparse.Namespace) -> list[Line]:
    """Greedy continuation with a KV cache."""
    prompts = torch.randint(1, options.vocab, (4, 64), generator=torch.Generator().manual_seed(0))

    def continuation(model: PreTrainedModel, prompt: torch.Tensor = prompts) -> Callable[[], object]:
        mask = torch.ones_like(prompt)
        length = {"max_new_tokens": options.new_tokens, "min_new_tokens": options.new_tokens}
        return lambda: model.generate(prompt, attention_mask=mask, do_sample=False, **length)

    lines = []
    for number in (1, 2, NUM_ELMS):
        contenders = {"ensemble": continuation(EnsembleForCausalLM(models[:number])), "one": continuation(models[0])}
        seconds = rounds_of(contenders, options.rounds)
        lines.append(report(f"generate: {number} ELMs / {number} x one model", seconds, scale=number, floor=1.1))
    top_k = EnsembleConfig.model_validate({"top_k": TOP_K})
    by_prior = EnsembleForCausalLM(models, prior={str(i): 1.0 + i for i in range(NUM_ELMS)}, ensemble=top_k)
    by_posterior, dense = EnsembleForCausalLM(models, ensemble=top_k), EnsembleForCausalLM(models)
    # One prompt: random models share no domains, so each prompt of a batch would choose other ELMs.
    for kind, top in (("prior", by_prior), ("posterior", by_posterior)):
        contenders = {"top": continuation(top, prompts[:1]), "all": continuation(dense, prompts[:1])}
        seconds = rounds_of(contenders, options.rounds)
        lines.append(report(f"generate: top-{TOP_K} of {NUM_ELMS} by {kind} / all {NUM_ELMS}", seconds, goal=0.30))
    return lines


def main() -> None:
    """Run all comparisons."""
    tune_allocator()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--vocab", type=int, default=8192)
    parser.add_argument("--documents", type=int, default=16)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="one round of few tokens")
    options = parser.parse_args()
    if options.quick:
        options.rounds, options.documents, options.new_tokens = 1, 2, 4
    models = [make_model(options, seed) for seed in range(NUM_ELMS)]
    parameters = sum(weight.numel() for weight in models[0].parameters())
    sys.stdout.write(f"{NUM_ELMS} Llamas of {parameters / 1e6:.1f}M, bf16, {torch.get_num_threads()} threads\n")
    close([*bench_scoring(models, options), *bench_generating(models, options)])


if __name__ == "__main__":
    main()
