"""The minimal loops that the trainer is measured against: ``python hand_written_loops.py SPEC KIND ROWS``.

Recipe of the request that the worker gets, to the letter: initial weights, token batches in their shuffled order (drawn
before the first update, so that they cost these loops nothing), one forward and backward per update, clipping by the
global norm, fused AdamW with decay of matrices only, the learning rate of each update, tuned allocator. fp32 weights
are kept in both kinds: under ``autocast`` the model holds them; with ``bf16`` weights they are masters beside it.
What these loops leave out: metrics but the loss, checkpoints, the checks for bad updates, deterministic algorithms.
"""

import json
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path

import torch
from transformers import PreTrainedModel

from btm.config_train import TrainConfig
from btm.corpus.sampler import BatchSampler
from btm.corpus.tokenizer import TextEncoder
from btm.model.allocator import tune_allocator
from btm.model.causal_lm import build_model
from btm.requests import TrainSpec
from btm.train.schedule import learning_rate

AUTOCAST, BF16 = KINDS = ("autocast", "bf16 weights")
Step = Callable[[float], None]
"""Clips and updates with a learning rate, and clears the gradients."""


def train(spec: TrainSpec, kind: str, rows: Path) -> None:
    """Train and write the loss of each update as one line of ``rows``."""
    encoder = TextEncoder(spec.tokenizer_dir)
    model = build_model(spec.model, vocab_size=encoder.vocab_size, eos_id=encoder.eos_id, seed=spec.seed).train()
    batches = draw(spec, encoder.eos_id)
    step = autocast_step(model, spec.train) if kind == AUTOCAST else master_step(model, spec.train)
    with rows.open("w", encoding="utf-8", buffering=1) as file:
        for update, (inputs, targets) in enumerate(batches, 1):
            with torch.autocast("cpu", torch.bfloat16) if kind == AUTOCAST else nullcontext():
                logits = model(input_ids=inputs, use_cache=False).logits
                loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
            loss.backward()
            step(learning_rate(update, spec.total_updates, spec.train))
            file.write(json.dumps({"train/loss": loss.item()}) + "\n")


def draw(spec: TrainSpec, eos_id: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Inputs and targets ``(sequences, length)`` of all updates."""
    sampler = BatchSampler(
        spec.sources,
        sequence_length=spec.train.sequence_length,
        batch_sequences=spec.batch_sequences,
        packing=spec.train.packing,
        seed=spec.seed,
        eos_id=eos_id,
    )
    drawn = [sampler.batch(update) for update in range(spec.first_update, spec.last_update)]
    return [(torch.tensor(batch.inputs), torch.tensor(batch.targets)) for batch in drawn]


def autocast_step(model: PreTrainedModel, recipe: TrainConfig) -> Step:
    """The model holds fp32 weights."""
    optimizer = adamw(list(model.parameters()), recipe)

    def step(lr: float) -> None:
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip_norm)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def master_step(model: PreTrainedModel, recipe: TrainConfig) -> Step:
    """The model holds bf16 weights, rounded from fp32 masters after each update."""
    weights = list(model.parameters())
    masters = [torch.nn.Parameter(weight.detach().clone()) for weight in weights]
    for weight in weights:
        weight.data = weight.data.bfloat16()
    optimizer = adamw(masters, recipe)

    def step(lr: float) -> None:
        for weight, master in zip(weights, masters, strict=True):
            assert weight.grad is not None
            master.grad, weight.grad = weight.grad.float(), None
        torch.nn.utils.clip_grad_norm_(masters, recipe.clip_norm)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        with torch.no_grad():
            for weight, master in zip(weights, masters, strict=True):
                weight.copy_(master)

    return step


def adamw(weights: Sequence[torch.nn.Parameter], recipe: TrainConfig) -> torch.optim.AdamW:
    """Matrices decay, all else does not."""
    groups = [
        {"params": [weight for weight in weights if weight.ndim >= 2], "weight_decay": recipe.weight_decay},
        {"params": [weight for weight in weights if weight.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=recipe.lr, betas=(recipe.beta1, recipe.beta2), eps=recipe.eps, fused=True)


def main() -> None:
    """Run what the command line asks for."""
    tune_allocator()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS") or len(os.sched_getaffinity(0))))
    spec, kind, rows = sys.argv[1:]
    train(TrainSpec.load(Path(spec)), kind, Path(rows))


if __name__ == "__main__":
    main()
