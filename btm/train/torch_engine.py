"""The engine for models that fit one device: a single process, or data parallel over gloo or NCCL."""

from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel

from btm.config_model import Dtype, EngineConfig
from btm.config_train import TrainConfig
from btm.corpus.sampler import Batch, BatchSampler
from btm.corpus.windows import Windows
from btm.model.causal_lm import flops_per_token, num_parameters, save_model
from btm.model.loss import loss_sum, token_losses
from btm.model.patches import prepare_for_training
from btm.train.engine import Gradients, TensorFiles
from btm.train.flat import FlatParameters
from btm.train.peak import matmul_peak
from btm.train.ranks import Ranks

_MAX_SEED = 2**63
_DTYPES = {Dtype.bf16: torch.bfloat16, Dtype.fp32: torch.float32}


class TorchEngine:
    """fp32 master weights and AdamW (https://arxiv.org/abs/1711.05101) around a model in bf16 or fp32.

    Each rank computes the gradient of the sum of the losses of its rows; the sum over ranks, divided by the number of
    target tokens of the batch, is the gradient of a single process, whatever the number of ranks and micro-batches.
    """

    def __init__(self, model: PreTrainedModel, *, train: TrainConfig, config: EngineConfig, ranks: Ranks) -> None:
        """Take over ``model`` (fp32, on the CPU).

        Args:
            model: What to train; its parameters become views of this engine's buffers.
            train: Recipe.
            config: Arithmetic.
            ranks: The processes that run this model.
        """
        self.ranks = ranks
        self.model = model
        self._train = train
        self._dtype = _DTYPES[config.dtype]
        self.num_parameters = num_parameters(model)
        self.flops_per_token = flops_per_token(model, train.sequence_length)
        self.flat = FlatParameters(model, ranks.device, self._dtype)
        prepare_for_training(model, ranks.device, self._dtype)
        self._moments = [torch.zeros_like(self.flat.masters) for _ in range(2)]
        self._optimizer = self._make_optimizer()
        self._num_targets = 1
        self._norm = 0.0
        model.train()

    @property
    def num_optimizer_steps(self) -> int:
        """Optimizer steps taken so far."""
        return int(next(iter(self._optimizer.state.values()))["step"].item())

    def gradients(self, batch: Batch, *, random_seed: int, stop_requested: bool) -> Gradients:
        """See :meth:`btm.train.engine.Engine.gradients`."""
        torch.manual_seed((random_seed * self.ranks.size + self.ranks.rank) % _MAX_SEED)
        self._num_targets = max(1, sum(batch.domain_tokens.values()))
        rows = BatchSampler.rows(batch, self.ranks.rank, self.ranks.size)
        self.flat.start_gradients()
        self.flat.extra[0] = self._backward(rows)
        self.flat.extra[1] = float(stop_requested)
        self.flat.finish_gradients()
        self.ranks.sum_(self.flat.gradients_and_extra)
        # The only wait for the device in an update.
        loss, stops, norm = torch.cat([self.flat.extra[:2].double(), self.flat.gradient_norm()[None]]).tolist()
        self._norm = norm / self._num_targets
        return Gradients(loss / self._num_targets, self._norm, stops > 0)

    def step(self, learning_rate: float) -> None:
        """See :meth:`btm.train.engine.Engine.step`."""
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
            group["params"][0].grad = self.flat.gradients[group["begin"] : group["end"]]
        # The fused kernel divides by this on the way: to the mean over targets, and to the norm that is allowed.
        scale = self._num_targets * max(1.0, self._norm / self._train.clip_norm)
        self._optimizer.grad_scale = torch.tensor(scale, device=self.ranks.device)  # pyright: ignore[reportAttributeAccessIssue]
        self._optimizer.step()
        self.flat.refresh_weights()

    def mean_loss(self, windows: Windows) -> float:
        """See :meth:`btm.train.engine.Engine.mean_loss`."""
        count = self._train.micro_batch_sequences or max(1, self._train.batch_tokens // self._train.sequence_length)
        total = torch.zeros(2, dtype=torch.float64, device=self.ranks.device)
        self.model.eval()
        for begin in range(self.ranks.rank * count, len(windows.inputs), self.ranks.size * count):
            targets = self._tensor(windows.targets[begin : begin + count])
            losses = token_losses(self.model, self._tensor(windows.inputs[begin : begin + count]), targets)
            total[0] += losses.double().sum()
            total[1] += (targets >= 0).sum()
        self.model.train()
        loss, num_targets = self.ranks.sum_(total).tolist()
        return loss / max(1.0, num_targets)

    def tensor_files(self) -> TensorFiles:
        """See :meth:`btm.train.engine.Engine.tensor_files`."""
        moments = zip(("exp_avg", "exp_avg_sq"), self._moments, strict=True)
        return {
            "model.safetensors": {slot.name: slot.view(self.flat.masters) for slot in self.flat.slots},
            "optimizer.safetensors": {
                f"{kind}.{slot.name}": slot.view(buffer) for kind, buffer in moments for slot in self.flat.slots
            },
        }

    def tensors_loaded(self, num_optimizer_steps: int) -> None:
        """See :meth:`btm.train.engine.Engine.tensors_loaded`."""
        for state in self._optimizer.state.values():
            state["step"].fill_(num_optimizer_steps)
        self.flat.refresh_weights()

    def save_model(self, directory: Path, tokenizer_dir: Path) -> None:
        """See :meth:`btm.train.engine.Engine.save_model`."""
        self.flat.release()
        if self.ranks.is_main:
            save_model(self.model, directory, self._dtype, tokenizer_dir)

    def matmul_peak(self) -> float:
        """See :meth:`btm.train.engine.Engine.matmul_peak`."""
        peak = torch.tensor(
            [matmul_peak(self._dtype, self.ranks.device)], dtype=torch.float64, device=self.ranks.device
        )
        return float(self.ranks.sum_(peak).item())

    def _backward(self, rows: Batch) -> torch.Tensor:
        total = torch.zeros((), dtype=torch.float32, device=self.ranks.device)
        inputs, targets, segments = rows.inputs, rows.targets, rows.input_segments
        count = self._train.micro_batch_sequences or max(1, len(inputs))
        for begin in range(0, len(inputs), count):
            part = slice(begin, begin + count)
            loss = loss_sum(
                self.model,
                self._tensor(inputs[part]),
                self._tensor(targets[part]),
                None if segments is None else self._tensor(segments[part]),
            )
            loss.backward()
            total += loss.detach()
        return total

    def _tensor(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self.ranks.device, non_blocking=True)

    def _make_optimizer(self) -> torch.optim.AdamW:
        train, size, border = self._train, len(self.flat.masters), self.flat.num_decayed
        spans = [(0, border, train.weight_decay), (border, size, 0.0)]
        groups = [
            {
                "params": [torch.nn.Parameter(self.flat.masters[begin:end])],
                "weight_decay": decay,
                "begin": begin,
                "end": end,
            }
            for begin, end, decay in spans
            if begin < end
        ]
        optimizer = torch.optim.AdamW(groups, lr=train.lr, betas=(train.beta1, train.beta2), eps=train.eps, fused=True)
        for group in optimizer.param_groups:
            span = slice(group["begin"], group["end"])
            optimizer.state[group["params"][0]] = {
                "step": torch.zeros((), dtype=torch.float32, device=self.ranks.device),
                "exp_avg": self._moments[0][span],
                "exp_avg_sq": self._moments[1][span],
            }
        return optimizer
