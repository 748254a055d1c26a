"""The engine for models that outgrow one device: DeepSpeed's ZeRO (https://arxiv.org/abs/1910.02054).

DeepSpeed runs forward, backward, the reduction of gradients and the exchange of weights; loss, clipping, AdamW and
checkpoints are those of :class:`btm.train.torch_engine.TorchEngine`. DeepSpeed's own checkpoints are pickles, cut by
stage and number of processes; ours are gathered from its partitions into whole fp32 tensors under Hugging Face names,
as safetensors. A run can therefore go on with another ZeRO stage, another number of processes or another engine, which
is what DeepSpeed's universal checkpoints are for, without a conversion and without a pickle.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from btm.config_model import Dtype, EngineConfig, engine_problems
from btm.config_train import TrainConfig
from btm.corpus.sampler import Batch, BatchSampler
from btm.corpus.windows import Windows
from btm.errors import ConfigError
from btm.model.activation_checkpointing import checkpoint_activations
from btm.model.causal_lm import flops_per_token, num_parameters, save_model
from btm.model.loss import IGNORED
from btm.model.patches import prepare_for_training
from btm.model.sparse_lm import sparsity_of
from btm.train.deepspeed_adam import gated_adamw
from btm.train.deepspeed_config import deepspeed_config, zero_stage
from btm.train.deepspeed_shards import shards_of
from btm.train.deepspeed_start import Losses, initialize
from btm.train.engine import DevLoss, Gradients, TensorFiles
from btm.train.gathered_tensors import FILES, Files, taken_from_main, tensor_name
from btm.train.peak import matmul_peak_of
from btm.train.ranks import Ranks, naming_lost_exchanges

_MAX_SEED = 2**63
_DTYPES = {Dtype.bf16: torch.bfloat16, Dtype.fp32: torch.float32}


class DeepSpeedEngine:
    """fp32 master weights and AdamW, shared out among processes, around a dense model in bf16 or fp32.

    Every rank runs equally many passes, padded ones where it has fewer rows, because DeepSpeed exchanges gradients and
    weights in each. The loss convention is that of the torch engine: gradients of sums over targets, divided by the
    targets of the whole batch.
    """

    def __init__(self, model: PreTrainedModel, *, train: TrainConfig, config: EngineConfig, ranks: Ranks) -> None:
        """Take over ``model`` (fp32, on the CPU).

        Args:
            model: What to train; DeepSpeed cuts up its parameters.
            train: Recipe.
            config: ZeRO stage, offload, arithmetic and further keys for DeepSpeed.
            ranks: The processes that run this model.

        Raises:
            ConfigError: If the model has expert layers or frozen weights, or DeepSpeed refuses its keys.
            TrainingError: If DeepSpeed is not installed.
        """
        _check_model(model, config)
        self.ranks = ranks
        self.model = model
        self.num_parameters = num_parameters(model)
        self.flops_per_token = flops_per_token(model, train.sequence_length)
        self.num_optimizer_steps = 0
        self._train = train
        self._dtype = _DTYPES[config.dtype]
        self._parameters = dict(model.named_parameters())
        self._shapes = {name: parameter.shape for name, parameter in self._parameters.items()}
        self._num_targets = 1
        self._norm = 0.0
        self._has_gradients = False
        self._to_fill: Files = {}
        self._optimizer = gated_adamw(self._parameters.values(), train)
        exact = None
        if self._dtype != torch.float32:
            # DeepSpeed makes master weights from rounded ones.
            exact = {name: parameter.detach().clone() for name, parameter in self._parameters.items()}
        prepare_for_training(model, ranks.device, self._dtype)
        if self._train.activation_checkpointing:
            checkpoint_activations(model, is_reentrant=zero_stage(config) == 3)
        model.train()
        settings = deepspeed_config(config, self.num_parameters)
        with naming_lost_exchanges():
            self._engine = initialize(Losses(model), self._optimizer, settings, ranks)
            self._shards = shards_of(self._engine.optimizer, self._optimizer, stage=zero_stage(config), rank=ranks.rank)
            if exact is not None:
                for name, parameter in self._parameters.items():
                    self._shards.fill(parameter, None, exact[name].to(ranks.device))
                self._shards.refresh_weights()

    def gradients(self, batch: Batch, *, random_seed: int, stop_requested: bool) -> Gradients:
        """See :meth:`btm.train.engine.Engine.gradients`."""
        torch.manual_seed((random_seed * self.ranks.size + self.ranks.rank) % _MAX_SEED)
        self._num_targets = max(1, sum(batch.domain_tokens.values()))
        with naming_lost_exchanges():
            self._drop_gradients()
            loss = self._backward(batch)
        values = torch.zeros(3, dtype=torch.float64, device=self.ranks.device)
        values[0], values[1] = loss, float(stop_requested)
        if self.ranks.is_main or not self._shards.is_replicated:
            for gradient in self._shards.gradients():
                values[2] += torch.linalg.vector_norm(gradient, dtype=torch.float64).square()
        total, stops, squares = self.ranks.sum_(values).tolist()
        # DeepSpeed's gradients are means over processes.
        self._norm = squares**0.5 * self.ranks.size / self._num_targets
        return Gradients(total / self._num_targets, self._norm, stops > 0)

    def step(self, learning_rate: float) -> None:
        """See :meth:`btm.train.engine.Engine.step`."""
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        # The fused kernel divides by this on the way: to the mean over targets, and to the norm that is allowed.
        scale = self._num_targets / self.ranks.size * max(1.0, self._norm / self._train.clip_norm)
        self._optimizer.grad_scale = torch.tensor(scale, device=self._shards.masters[0].device)
        with naming_lost_exchanges(), self._optimizer.opened():
            self._engine.step()
        self._has_gradients = False
        self.num_optimizer_steps += 1

    def dev_loss(self, windows: Windows, domain_id: int | None = None) -> DevLoss:
        """See :meth:`btm.train.engine.Engine.dev_loss`."""
        del domain_id
        count = self._train.micro_batch_sequences or max(1, self._train.batch_tokens // self._train.sequence_length)
        total = torch.zeros(2, dtype=torch.float64, device=self.ranks.device)
        self.model.eval()
        with naming_lost_exchanges(), torch.no_grad():
            for first in range(0, len(windows.inputs), self.ranks.size * count):
                begin = first + self.ranks.rank * count
                inputs, targets = windows.inputs[begin : begin + count], windows.targets[begin : begin + count]
                if not len(inputs):
                    inputs, targets = windows.inputs[:1], np.full_like(windows.targets[:1], IGNORED)
                losses = self._engine.module(self._tensor(inputs), self._tensor(targets), None, by_token=True)
                total[0] += losses.double().sum()
                total[1] += float((targets != IGNORED).sum())
        self.model.train()
        loss, num_targets = self.ranks.sum_(total).tolist()
        return DevLoss(loss / max(1.0, num_targets), {})

    def expert_metrics(self) -> dict[str, float]:
        """See :meth:`btm.train.engine.Engine.expert_metrics`."""
        return {}

    def tensor_files(self) -> TensorFiles:
        """See :meth:`btm.train.engine.Engine.tensor_files`; every rank calls it, the main rank alone gets tensors.

        They are copies in the memory of the main rank, 12 bytes per weight.
        """
        files: dict[str, dict[str, torch.Tensor]] = {name: {} for name in FILES}
        with naming_lost_exchanges():
            for file, kind, name, parameter in self._tensors():
                value = self._shards.whole(parameter, kind)
                if self.ranks.is_main:
                    files[file][tensor_name(kind, name)] = value.detach().to("cpu", copy=True).contiguous()
        self._to_fill = files
        return files if self.ranks.is_main else {}

    def tensors_loaded(self, num_optimizer_steps: int) -> None:
        """See :meth:`btm.train.engine.Engine.tensors_loaded`; the main rank tells the others what it loaded."""
        with naming_lost_exchanges():
            for file, kind, name, parameter in self._tensors():
                tensors, shape = self._to_fill[file], self._shapes[name]
                value = taken_from_main(self.ranks, tensors, tensor_name(kind, name), shape)
                self._shards.fill(parameter, kind, value)
            self._shards.refresh_weights()
        for master in self._shards.masters:
            self._optimizer.state[master]["step"].fill_(num_optimizer_steps)
        self.num_optimizer_steps = num_optimizer_steps

    def save_model(self, directory: Path, tokenizer_dir: Path) -> None:
        """See :meth:`btm.train.engine.Engine.save_model`."""
        with naming_lost_exchanges():
            for parameter in self._parameters.values():
                value = self._shards.whole(parameter, None)
                if self.ranks.is_main:
                    parameter.data = value.detach().to("cpu", self._dtype, copy=True)
        if self.ranks.is_main:
            save_model(self.model, directory, self._dtype, tokenizer_dir)

    def matmul_peak(self) -> float:
        """See :meth:`btm.train.engine.Engine.matmul_peak`."""
        return matmul_peak_of(self.ranks, self._dtype)

    def _backward(self, batch: Batch) -> torch.Tensor:
        """Gradients of this rank's rows of ``batch``; returns the sum of their losses."""
        rows = BatchSampler.rows(batch, self.ranks.rank, self.ranks.size)
        most_rows = max(1, -(-len(batch.tokens) // self.ranks.size))
        count = self._train.micro_batch_sequences or most_rows
        total = torch.zeros((), dtype=torch.float64, device=self.ranks.device)
        for begin in range(0, most_rows, count):
            part = rows.part(slice(begin, begin + count))
            targets = part.targets
            if not len(part.inputs):
                part = batch.part(slice(0, 1))
                targets = np.full_like(part.targets, IGNORED)
            segments = None if part.input_segments is None else self._tensor(part.input_segments)
            self._engine.set_gradient_accumulation_boundary(begin + count >= most_rows)
            loss = self._engine(self._tensor(part.inputs), self._tensor(targets), segments)
            self._engine.backward(loss, scale_wrt_gas=False)
            total += loss.detach()
        self._has_gradients = True
        return total

    def _drop_gradients(self) -> None:
        """Forget the gradients of an update that was skipped."""
        if self._has_gradients and not self._shards.drop_gradients():
            self._engine.step()
        self._has_gradients = False

    def _tensors(self) -> Iterator[tuple[str, str | None, str, nn.Parameter]]:
        for file, kinds in FILES.items():
            for kind in kinds:
                for name, parameter in self._parameters.items():
                    yield file, kind, name, parameter

    def _tensor(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self.ranks.device, non_blocking=True)


def _check_model(model: PreTrainedModel, config: EngineConfig) -> None:
    problems = engine_problems(config, is_sparse=sparsity_of(model) is not None)
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    if frozen:
        problems.append(f"engine=deepspeed trains all weights, got frozen ones ({frozen[0]}); use engine=torch")
    if problems:
        raise ConfigError(problems)
