"""What the training loop needs of the thing that runs forward, backward and the optimizer step."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np

from btm.corpus.sampler import Batch
from btm.corpus.windows import Windows
from btm.train.ranks import Ranks
from btm.train.tensor_file import Tensors

TensorFiles = Mapping[str, Tensors]
"""File name -> tensor name -> fp32 tensor, whole or divided over processes."""


@dataclass(frozen=True, slots=True)
class Gradients:
    """What one forward and backward gave, the same on every rank."""

    loss: float
    """Mean over the target tokens of the whole batch, nats."""
    norm: float
    """Global norm of the gradient of that mean, before clipping."""
    must_stop: bool
    """Whether any rank was asked to stop."""


@dataclass(frozen=True, slots=True)
class DevLoss:
    """What held-out documents gave, the same on every rank."""

    loss: float
    """Mean over all targets, nats."""
    expert_counts: Mapping[int, Sequence[int]]
    """Block -> tokens that each of its experts took; empty for dense models."""
    class_counts: Mapping[int, np.ndarray] = field(default_factory=dict)
    """Block -> tokens of each class that each expert took, int64 ``(classes, E)``; empty where no classes are known."""


class Engine(Protocol):
    """Runs one model, on one process or several."""

    @property
    def ranks(self) -> Ranks:
        """The processes that run this model."""
        ...

    @property
    def num_parameters(self) -> int:
        """Weights of the whole model; shared ones count once."""
        ...

    @property
    def flops_per_token(self) -> float:
        """Training FLOPs per token at the sequence length of the run; of experts only those that a token meets."""
        ...

    @property
    def num_optimizer_steps(self) -> int:
        """Optimizer steps taken so far, those of a continued parent included."""
        ...

    def gradients(self, batch: Batch, *, random_seed: int, stop_requested: bool) -> Gradients:
        """Run forward and backward over the whole batch; every rank passes the same one and takes its rows.

        Args:
            batch: Sequences of the update.
            random_seed: Root of the random numbers (dropout) of this update.
            stop_requested: Whether this rank was asked to stop.
        """
        ...

    def step(self, learning_rate: float) -> None:
        """Clip the gradients and take one optimizer step; left out for an update that is skipped."""
        ...

    def dev_loss(self, windows: Windows, domain_id: int | None = None) -> DevLoss:
        """Score held-out documents; every rank passes the same windows.

        Args:
            windows: Of documents of one domain.
            domain_id: Number of the domain for the expert layers of the model; None where the model does not know it.
        """
        ...

    def expert_metrics(self) -> Mapping[str, float]:
        """What the expert layers did in the last update, by metric name; every rank calls it. Empty for dense ones."""
        ...

    def tensor_files(self) -> TensorFiles:
        """Master weights and optimizer state as views: written to checkpoints, and filled from them.

        Names and shapes are those of the whole model, however it is divided over processes.
        """
        ...

    def tensors_loaded(self, num_optimizer_steps: int) -> None:
        """Take over what was filled into :meth:`tensor_files`."""
        ...

    def save_model(self, directory: Path, tokenizer_dir: Path) -> None:
        """Write the Hugging Face directory of the trained model; training ends with this. Every rank calls it."""
        ...

    def matmul_peak(self) -> float:
        """FLOP/s that all ranks together reach in bare matmuls, measured now; every rank calls it."""
        ...
