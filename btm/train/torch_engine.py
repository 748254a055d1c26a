"""The engine for models that fit one device: a single process, or data and expert parallel over gloo or NCCL."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel

from btm.config_model import Dtype, EngineConfig
from btm.config_train import TrainConfig
from btm.corpus.sampler import Batch
from btm.corpus.windows import Windows
from btm.model.activation_checkpointing import checkpoint_activations
from btm.model.causal_lm import flops_per_token, num_parameters, save_model
from btm.model.expert_pass import ExpertPass
from btm.model.loss import loss_sum, token_losses
from btm.model.patches import prepare_for_training
from btm.train.engine import DevLoss, Gradients, TensorFiles
from btm.train.expert_division import ExpertDivision
from btm.train.expert_owners import expert_owners, num_experts, step_names
from btm.train.expert_training import ExpertTraining
from btm.train.flat import FlatParameters
from btm.train.flat_adam import FlatAdamW
from btm.train.passes import Passes
from btm.train.peak import matmul_peak_of
from btm.train.ranks import Ranks, naming_lost_exchanges

_NUM_VALUES = 2
_DTYPES = {Dtype.bf16: torch.bfloat16, Dtype.fp32: torch.float32}


class TorchEngine:
    """fp32 master weights and AdamW (https://arxiv.org/abs/1711.05101) around a model in bf16 or fp32.

    Each rank computes the gradient of the sum of the losses of its rows; the sum over ranks, divided by the number of
    target tokens of the batch, is the gradient of a single process, whatever the number of ranks and micro-batches.
    Experts that no token of an update reached stay as they are, moments and step counts included. With
    ``engine.expert_parallel`` each process holds a share of the experts, and tokens travel to them.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        train: TrainConfig,
        config: EngineConfig,
        ranks: Ranks,
        passes: Sequence[int] | None = None,
        token_classes: torch.Tensor | None = None,
    ) -> None:
        """Take over ``model`` (fp32, on the CPU).

        Args:
            model: What to train; its parameters become views of this engine's buffers.
            train: Recipe.
            config: Arithmetic.
            ranks: The processes that run this model.
            passes: Sequences of each pass of an update, in the order of the batch; None divides what each process has
                by ``train.micro_batch_sequences``.
            token_classes: Class of each token id, int64 [vocabulary], by which the tokens of experts are counted.

        Raises:
            ConfigError: If ``engine.expert_parallel`` does not divide the number of processes.
        """
        self.ranks = ranks
        self.model = model
        self._train = train
        self._dtype = _DTYPES[config.dtype]
        self.num_parameters = num_parameters(model)
        self.flops_per_token = flops_per_token(model, train.sequence_length)
        self._num_owners, self._step_names = num_experts(model), step_names(model)
        self._division = ExpertDivision.of(model, ranks, config.expert_parallel) if self._num_owners else None
        self.flat = FlatParameters(
            model,
            ranks.device,
            self._dtype,
            owners=expert_owners(model),
            local=() if self._division is None else set(self._division.local_names.values()),
            num_extra=_NUM_VALUES + self._num_owners,
        )
        prepare_for_training(model, ranks.device, self._dtype)
        if train.activation_checkpointing:
            checkpoint_activations(model)
        self._experts = ExpertTraining.of(
            model, ranks, are_divided=self._division is not None, token_classes=token_classes
        )
        self._adam = FlatAdamW(self.flat, train, self._num_owners)
        self._is_busy = np.zeros(self._num_owners, dtype=bool)
        self._passes = Passes.of(
            model,
            train,
            ranks,
            sizes=passes,
            num_shares=config.expert_parallel,
            are_equal=self._experts is not None and self._experts.needs_equal_passes,
            dev_are_equal=self._division is not None,
        )
        self._num_targets, self._random_seed = 1, 0
        self._norm = 0.0
        model.train()

    @property
    def num_optimizer_steps(self) -> int:
        """Optimizer steps taken so far."""
        return self._adam.steps.shared

    def gradients(self, batch: Batch, *, random_seed: int, stop_requested: bool) -> Gradients:
        """See :meth:`btm.train.engine.Engine.gradients`."""
        self._num_targets, self._random_seed = max(1, sum(batch.domain_tokens.values())), random_seed
        self.flat.start_gradients()
        with naming_lost_exchanges():
            self.flat.extra[0] = self._backward(batch)
        self.flat.extra[1] = float(stop_requested)
        marks = self.flat.extra[_NUM_VALUES : _NUM_VALUES + self._num_owners]
        if self._experts is not None:
            marks.copy_(self._experts.busy())
        self.flat.finish_gradients()
        self.ranks.sum_(self.flat.common_gradients_and_extra)
        squares = self.flat.gradient_squares()[1] if self._division is None else self._division.reduce(self.flat)
        # The only wait for the device in an update.
        values = [self.flat.extra[:_NUM_VALUES].double(), squares.sqrt()[None], marks.double()]
        loss, stops, norm, *busy = torch.cat(values).tolist()
        self._norm = norm / self._num_targets
        self._is_busy = np.array(busy) > 0
        return Gradients(loss / self._num_targets, self._norm, stops > 0)

    def step(self, learning_rate: float) -> None:
        """See :meth:`btm.train.engine.Engine.step`."""
        # The fused kernel divides by this on the way: to the mean over targets, and to the norm that is allowed.
        scale = self._num_targets * max(1.0, self._norm / self._train.clip_norm)
        self._adam.step(learning_rate, scale, self._is_busy)
        self.flat.refresh_weights()

    def dev_loss(self, windows: Windows, domain_id: int | None = None) -> DevLoss:
        """See :meth:`btm.train.engine.Engine.dev_loss`."""
        total = torch.zeros(2, dtype=torch.float64, device=self.ranks.device)
        passes: list[ExpertPass] = []
        self.model.eval()
        for arrays in self._passes.of_windows(windows):
            inputs, targets = (self._tensor(array) for array in arrays)
            if self._experts is not None:
                passes.append(self._experts.dev_pass_of(targets, domain_id))
            with naming_lost_exchanges():
                losses = token_losses(self.model, inputs, targets, experts=passes[-1] if passes else None)
            total[0] += losses.double().sum()
            total[1] += (targets >= 0).sum()
        self.model.train()
        loss, num_targets = self.ranks.sum_(total).tolist()
        mean = loss / max(1.0, num_targets)
        if self._experts is None:
            return DevLoss(mean, {})
        return DevLoss(mean, self._experts.counts(passes), self._experts.class_counts(passes))

    def expert_metrics(self) -> dict[str, float]:
        """See :meth:`btm.train.engine.Engine.expert_metrics`."""
        return {} if self._experts is None else self._experts.metrics(self._num_targets)

    def tensor_files(self) -> TensorFiles:
        """See :meth:`btm.train.engine.Engine.tensor_files`."""
        masters, *moments = (
            tensors if self._division is None else self._division.undivided(tensors)
            for buffer in (self.flat.masters, *self._adam.moments)
            for tensors in [{slot.name: slot.view(buffer) for slot in self.flat.slots}]
        )
        steps = {f"step.{name}": self._adam.steps.experts[which] for name, which in self._step_names.items()}
        named = zip(("exp_avg", "exp_avg_sq"), moments, strict=True)
        optimizer = {f"{kind}.{name}": tensor for kind, tensors in named for name, tensor in tensors.items()}
        kept = {} if self._experts is None else self._experts.kept_buffers()
        return {"model.safetensors": {**masters, **kept}, "optimizer.safetensors": optimizer | steps}

    def tensors_loaded(self, num_optimizer_steps: int) -> None:
        """See :meth:`btm.train.engine.Engine.tensors_loaded`."""
        self._adam.steps.shared = num_optimizer_steps
        self.flat.refresh_weights()

    def save_model(self, directory: Path, tokenizer_dir: Path) -> None:
        """See :meth:`btm.train.engine.Engine.save_model`."""
        self.flat.release()
        if self._division is not None:
            self._division.restore(self.model, self._dtype)
        if self.ranks.is_main:
            save_model(self.model, directory, self._dtype, tokenizer_dir)

    def matmul_peak(self) -> float:
        """See :meth:`btm.train.engine.Engine.matmul_peak`."""
        return matmul_peak_of(self.ranks, self._dtype)

    def _backward(self, batch: Batch) -> torch.Tensor:
        """Gradients of this rank's passes over ``batch``; returns the sum of their losses."""
        targets_per_token = self._num_targets / max(1, batch.num_input_tokens)
        total = torch.zeros((), dtype=torch.float32, device=self.ranks.device)
        if self._experts is not None:
            self._experts.start_update()
        for one in self._passes.of_batch(batch, self._random_seed):
            loss = self._pass(one.part, 0.0 if one.is_padding else targets_per_token)
            if not one.is_padding:
                total += loss
        if self._experts is not None:
            self._experts.end_update()
        return total

    def _pass(self, part: Batch, targets_per_token: float) -> torch.Tensor:
        segments = part.input_segments
        experts, extra = None if self._experts is None else self._experts.pass_of(part), None
        loss = loss_sum(
            self.model,
            self._tensor(part.inputs),
            self._tensor(part.targets),
            None if segments is None else self._tensor(segments),
            experts,
        )
        if self._experts is not None and experts is not None:
            extra = self._experts.loss(experts, part.num_input_tokens * targets_per_token)
        (loss if extra is None else loss + extra).backward()
        if self._experts is not None:
            self._experts.end_pass()
        return loss.detach()

    def _tensor(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self.ranks.device, non_blocking=True)
