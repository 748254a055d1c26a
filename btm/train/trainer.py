"""The training loop: updates, metrics, evaluation, checkpoints, orderly stops."""

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from btm.corpus.sampler import Batch, BatchSampler
from btm.corpus.token_classes import TOKEN_CLASSES
from btm.corpus.windows import Windows
from btm.requests import TrainSpec
from btm.train.checkpoint import CheckpointStore
from btm.train.divided_tensor import contribute_all
from btm.train.engine import Engine
from btm.train.metrics import MetricsFile
from btm.train.progress import CheckpointState, MetricWindow, Progress
from btm.train.schedule import learning_rate
from btm.train.spikes import SpikeState, after_good, after_skip, problem_of

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """What one training run works with on this rank."""

    spec: TrainSpec
    engine: Engine
    sampler: BatchSampler
    dev: Mapping[str, Windows]
    store: CheckpointStore
    metrics: MetricsFile | None
    """On the main rank only."""
    tokenizer_sha256: str


class Trainer:
    """Brings a run from where it is to the last update of its request.

    Everything that is decided here (skips, rows, checkpoints, stops) follows from values that are equal on all ranks.

    Args:
        run: What to work with.
        progress: Where the run is.
        stop_requested: Whether this process was asked to stop.
    """

    def __init__(self, run: Run, progress: Progress, stop_requested: Callable[[], bool]) -> None:
        self.progress = progress
        self._run = run
        self._train = run.spec.train
        self._stop_requested = stop_requested
        self._saved_update: int | None = None
        self._grad_norm = 0.0

    @property
    def engine(self) -> Engine:
        """What runs the model."""
        return self._run.engine

    def train(self) -> bool:
        """Run all updates that are left.

        Returns:
            True when the last update is done; False after an orderly stop, with a checkpoint of the update reached.

        Raises:
            TrainingError: If too many updates in a row are bad, or a checkpoint cannot be written.
        """
        spec = self._run.spec
        while self.progress.update < spec.last_update:
            must_stop = self._update(self.progress.update + 1)
            update, is_last = self.progress.update, self.progress.update == spec.last_update
            if is_last or update % self._train.log_every == 0:
                self._log_row()
            if is_last or update % self._train.eval_every == 0:
                self.evaluate()
            if is_last or must_stop or update % self._train.checkpoint_every == 0:
                self.save()
            if must_stop and not is_last:
                return False
        return True

    def evaluate(self) -> None:
        """Measure the loss on the dev documents of each domain and write a row."""
        update = self.progress.update
        ids = {domain: number for number, domain in enumerate(self._run.sampler.domains)}
        results = {
            domain: self._run.engine.dev_loss(windows, ids.get(domain)) for domain, windows in self._run.dev.items()
        }
        self._advance(dev_loss={domain: result.loss for domain, result in results.items()}, dev_update=update)
        if not results:
            return
        row: dict[str, Any] = {f"eval/{domain}/loss": result.loss for domain, result in results.items()}
        for domain, result in results.items():
            row |= {f"eval/{domain}/experts/{block}": counts for block, counts in result.expert_counts.items()}
        for block in next(iter(results.values())).class_counts:
            by_class = np.sum([result.class_counts[block] for result in results.values()], axis=0)
            for name, counts in zip(TOKEN_CLASSES, by_class.tolist(), strict=False):
                if any(counts):
                    row[f"classes/{name}/experts/{block}"] = counts
        self._append(row)

    def save(self) -> None:
        """Write a checkpoint of the update reached, unless there is one."""
        progress = self.progress
        if self._saved_update == progress.update:
            return
        self._saved_update = progress.update
        # On every rank: an engine that shares out its state gathers it here.
        tensor_files = self._run.engine.tensor_files()
        if self._run.metrics is None:
            contribute_all(tensor_files.values())
            return
        self._run.metrics.sync()
        state = CheckpointState(
            spec=self._run.spec.model_dump(mode="json", by_alias=True),
            tokenizer_sha256=self._run.tokenizer_sha256,
            progress=progress,
        )
        self._run.store.save(progress.update, tensor_files, state.model_dump_json(by_alias=True))

    def mark_saved(self) -> None:
        """Say that the state now held came from the run's own checkpoint."""
        self._saved_update = self.progress.update

    def _update(self, update: int) -> bool:
        """One update; returns whether to stop after it."""
        began = time.perf_counter()
        spec, engine = self._run.spec, self._run.engine
        batch = self._run.sampler.batch(update - 1)
        gradients = engine.gradients(
            batch, random_seed=spec.seed * spec.total_updates + update, stop_requested=self._stop_requested()
        )
        self._grad_norm = gradients.norm
        state, loss = self.progress.spikes, gradients.loss
        problem = problem_of(loss, gradients.norm, state, self._train.spike_factor)
        if problem is None:
            engine.step(learning_rate(update, spec.total_updates, self._train))
            state = after_good(state, loss)
        else:
            state = self._skip(update, problem)
        self._count(update, batch, None if problem else loss, time.perf_counter() - began)
        self._advance(spikes=state, num_optimizer_steps=self.progress.num_optimizer_steps + (problem is None))
        return gradients.must_stop

    def _skip(self, update: int, problem: str) -> SpikeState:
        state = after_skip(self.progress.spikes, update, problem, self._train.max_bad_steps)
        if self._run.engine.ranks.is_main:
            logger.warning("update %d is skipped: %s", update, problem)
        return state

    def _count(self, update: int, batch: Batch, loss: float | None, seconds: float) -> None:
        progress, window = self.progress, self.progress.window
        tokens = self._run.spec.batch_sequences * self._train.sequence_length
        realised = dict(progress.realised_tokens)
        for domain, count in batch.domain_tokens.items():
            realised[domain] = realised.get(domain, 0) + count
        self._advance(
            update=update,
            tokens=progress.tokens + tokens,
            seconds=progress.seconds + seconds,
            realised_tokens=realised,
            window=MetricWindow(
                loss_sum=window.loss_sum + (loss or 0.0),
                num_losses=window.num_losses + (loss is not None),
                tokens=window.tokens + tokens,
                seconds=window.seconds + seconds,
            ),
        )

    def _log_row(self) -> None:
        window, spec = self.progress.window, self._run.spec
        mean = window.loss_sum / window.num_losses if window.num_losses else None
        tokens_per_s = window.tokens / max(1e-9, window.seconds)
        flops_per_s = tokens_per_s * self._run.engine.flops_per_token
        self._append(
            {
                "train/loss": mean,
                "train/lr": learning_rate(self.progress.update, spec.total_updates, self._train),
                "train/grad_norm": _finite(self._grad_norm),
                "train/tokens_per_s": tokens_per_s,
                "train/flops_per_s": flops_per_s,
                "train/peak_share": flops_per_s / self.progress.matmul_peak if self.progress.matmul_peak else None,
                "train/skipped": self.progress.spikes.num_skipped,
                **self._run.engine.expert_metrics(),
            }
        )
        self._advance(window=MetricWindow(), final_loss=self.progress.final_loss if mean is None else mean)

    def _append(self, values: dict[str, Any]) -> None:
        if self._run.metrics is None:
            return
        head = {"update": self.progress.update, "tokens": self.progress.tokens, "time": round(time.time(), 3)}
        self._run.metrics.append(head | {key: _finite(value) for key, value in values.items()})

    def _advance(self, **changes: Any) -> None:
        self.progress = self.progress.model_copy(update=changes)


def _finite(value: Any) -> Any:
    is_bad = isinstance(value, float) and not abs(value) < float("inf")
    return None if is_bad else value
