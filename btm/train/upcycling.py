"""The start of an upcycled training: its seed is checked, copied, and compared with what became of it."""

import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from btm.budget import resolved_sizes
from btm.corpus.tokenizer import tokenizer_sha256
from btm.corpus.windows import Windows
from btm.errors import CheckpointError
from btm.model.causal_lm import load_model
from btm.model.learning_routers import training_routing
from btm.model.loss import IGNORED, token_losses
from btm.model.upcycle import upcycle
from btm.requests import TrainSpec
from btm.train.engine import Engine
from btm.train.metrics import MetricsFile

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_ROWS = 8

logger = logging.getLogger(__name__)


def upcycled_model(spec: TrainSpec, vocab_size: int) -> "PreTrainedModel":
    """The model that ``spec`` begins with, from the seed that it names.

    Raises:
        CheckpointError: If the seed has another tokenizer, other sizes, or other expert layers than upcycling takes.
    """
    directory = Path(spec.start.path or "")
    if tokenizer_sha256(directory) != tokenizer_sha256(Path(spec.tokenizer_dir)):
        raise CheckpointError(
            f"{directory} was trained with another tokenizer than {spec.tokenizer_dir}; prepare the corpus with the "
            f"seed's: tokenizer.path={directory}"
        )
    seed = load_model(directory, vocab_size=vocab_size)
    _check_sizes(seed.config, spec)
    model = upcycle(seed, spec.ffn, random_seed=spec.seed)
    return model.train()


def report_jump(
    spec: TrainSpec, engine: Engine, model: "PreTrainedModel", dev: Mapping[str, Windows], metrics: MetricsFile | None
) -> None:
    """Measure and log what the upcycling did to the loss on dev documents, before the first update.

    The ``model`` that ``engine`` runs is read with the routing of its training: its auxiliary routers know nothing yet.
    Every rank calls it.
    """
    seed = load_model(spec.start.path or "").to(engine.ranks.device)  # pyright: ignore[reportArgumentType]
    row: dict[str, Any] = {"update": spec.first_update, "tokens": 0, "time": round(time.time(), 3)}
    for domain, windows in dev.items():
        before = _mean_loss(seed, windows)
        with training_routing(model):
            after = engine.dev_loss(windows).loss
        row |= {
            f"eval/{domain}/loss": after,
            f"eval/{domain}/seed_loss": before,
            f"eval/{domain}/upcycling_jump": after - before,
        }
        if metrics is not None:
            logger.info("upcycling %s: dev loss %.4f -> %.4f (%+.4f nats)", domain, before, after, after - before)
    if metrics is not None:
        metrics.append(row)


def _mean_loss(model: "PreTrainedModel", windows: Windows) -> float:
    total = 0.0
    for begin in range(0, len(windows.inputs), _ROWS):
        parts = (windows.inputs[begin : begin + _ROWS], windows.targets[begin : begin + _ROWS])
        inputs, targets = (torch.from_numpy(part).to(model.device) for part in parts)
        total += float(token_losses(model, inputs, targets).sum())
    return total / max(1, int((windows.targets != IGNORED).sum()))


def _check_sizes(config: Any, spec: TrainSpec) -> None:
    asked: dict[str, Any] = {"model_type": spec.model.arch, **resolved_sizes(spec.model)}
    differing = [
        f"{name} is {found}, asked is {value}"
        for name, value in asked.items()
        if (found := getattr(config, name, None)) != value
    ]
    if differing:
        raise CheckpointError(
            f"{spec.start.path} has other sizes: {'; '.join(differing)}; give model.* the values of the seed"
        )
