"""The engine for models that outgrow one device: DeepSpeed's ZeRO (https://arxiv.org/abs/1910.02054).

DeepSpeed runs forward, backward, the reduction of gradients and the exchange of weights; loss, clipping, AdamW and
checkpoints are those of :class:`btm.train.torch_engine.TorchEngine`. DeepSpeed's own checkpoints are pickles, cut by
stage and number of processes; ours are gathered from its partitions into whole fp32 tensors under Hugging Face names,
as safetensors. A run can therefore go on with another ZeRO stage, another number of processes or another engine, which
is what DeepSpeed's universal checkpoints are for, without a conversion and without a pickle.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel

from btm.config_model import Dtype, EngineConfig, engine_problems, share_problems
from btm.config_train import TrainConfig
from btm.corpus.sampler import Batch
from btm.corpus.windows import Windows
from btm.errors import ConfigError
from btm.model.activation_checkpointing import checkpoint_activations
from btm.model.causal_lm import flops_per_token, num_parameters, save_model
from btm.model.expert_block import expert_modules
from btm.model.expert_pass import ExpertPass
from btm.model.loss import IGNORED
from btm.model.patches import prepare_for_training
from btm.model.sparse_lm import sparsity_of
from btm.train.deepspeed_adam import gated_adamw
from btm.train.deepspeed_config import deepspeed_config, zero_stage
from btm.train.deepspeed_shards import shards_of, stretches_of
from btm.train.deepspeed_start import Losses, initialize, mark_expert
from btm.train.deepspeed_state import WholeState
from btm.train.engine import DevLoss, Gradients, TensorFiles
from btm.train.expert_division import ExpertDivision
from btm.train.expert_owners import expert_owners, num_experts, step_names
from btm.train.expert_training import ExpertTraining
from btm.train.gathered_tensors import FILES, Files, copy_from_main, taken_from_main, tensor_name
from btm.train.joined_gradients import join_gradients
from btm.train.passes import Passes
from btm.train.peak import matmul_peak_of
from btm.train.ranks import Ranks, naming_lost_exchanges

_NUM_VALUES = 3
_DTYPES = {Dtype.bf16: torch.bfloat16, Dtype.fp32: torch.float32}


class DeepSpeedEngine:
    """fp32 master weights and AdamW, shared out among processes, around a model in bf16 or fp32.

    Every rank runs equally many passes, padded ones where it has fewer rows, because DeepSpeed exchanges gradients and
    weights in each. The loss convention is that of the torch engine: gradients of sums over targets, divided by the
    targets of the whole batch. Up to ZeRO 2 the model may have expert layers: experts that no token of an update
    reached stay as they are, and with ``engine.expert_parallel`` each process holds a share of the experts, whose
    gradients and optimizer state are shared out among the processes with the same share.
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
            model: What to train; DeepSpeed cuts up its parameters.
            train: Recipe.
            config: ZeRO stage, offload, arithmetic and further keys for DeepSpeed.
            ranks: The processes that run this model.
            passes: Sequences of each pass of an update, in the order of the batch; None divides what each process has
                by ``train.micro_batch_sequences``.
            token_classes: Class of each token id, int64 [vocabulary], by which the tokens of experts are counted.

        Raises:
            ConfigError: If the model has frozen weights, or expert layers that cannot be shared out so, or DeepSpeed
                refuses its keys.
            TrainingError: If DeepSpeed is not installed.
        """
        _check_model(model, config)
        self.ranks = ranks
        self.model = model
        self.num_parameters = num_parameters(model)
        self.flops_per_token = flops_per_token(model, train.sequence_length)
        self._train = train
        self._dtype = _DTYPES[config.dtype]
        self._shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
        self._num_targets = 1
        self._norm = 0.0
        self._has_gradients = False
        self._to_fill: Files = {}
        self._step_names = step_names(model)
        self._is_busy = np.zeros(num_experts(model), dtype=bool)
        self._division = ExpertDivision.of(model, ranks, config.expert_parallel) if len(self._is_busy) else None
        self._experts = ExpertTraining.of(
            model, ranks, are_divided=self._division is not None, token_classes=token_classes
        )
        self._passes = Passes.of(
            model,
            train,
            ranks,
            sizes=passes,
            num_shares=config.expert_parallel,
            are_equal=True,
            dev_are_equal=True,
        )
        self._parameters = dict(model.named_parameters())
        self._start(config)

    def _start(self, config: EngineConfig) -> None:
        """Hand the model over to DeepSpeed."""
        model, ranks = self.model, self.ranks
        local = set() if self._division is None else set(self._division.local_names.values())
        for name in local:
            mark_expert(self._parameters[name], config.expert_parallel)
        self._optimizer = gated_adamw(self._parameters.values(), self._train, len(self._is_busy))
        exact = None
        if self._dtype != torch.float32:
            # DeepSpeed makes master weights from rounded ones.
            exact = {name: parameter.detach().clone() for name, parameter in self._parameters.items()}
        prepare_for_training(model, ranks.device, self._dtype)
        if self._train.activation_checkpointing:
            checkpoint_activations(model, is_reentrant=zero_stage(config) == 3)
        join_gradients(model)
        model.train()
        settings, stage = deepspeed_config(config, self.num_parameters), zero_stage(config)
        speaks = {True: self._division is not None and self._division.ranks.is_first, False: ranks.is_main}
        counted = [parameter for name, parameter in self._parameters.items() if speaks[name in local]]
        with naming_lost_exchanges():
            self._engine = initialize(
                Losses(model), self._optimizer, settings, ranks, expert_parallel=config.expert_parallel
            )
            self._shards = shards_of(
                self._engine.optimizer, self._optimizer, stage=stage, rank=ranks.rank, counted=counted
            )
            self._whole = WholeState(self._shards, self._parameters, self._division, ranks)
            self._optimizer.stretches = stretches_of(self._shards, self._parameters, expert_owners(model))
            if exact is not None:
                for name, parameter in self._parameters.items():
                    self._shards.fill(parameter, None, exact[name].to(ranks.device))
                self._shards.refresh_weights()

    @property
    def num_optimizer_steps(self) -> int:
        """Optimizer steps taken so far."""
        return self._optimizer.steps.shared

    def gradients(self, batch: Batch, *, random_seed: int, stop_requested: bool) -> Gradients:
        """See :meth:`btm.train.engine.Engine.gradients`."""
        self._to_fill = {}  # as large as a checkpoint
        self._num_targets = max(1, sum(batch.domain_tokens.values()))
        with naming_lost_exchanges():
            self._drop_gradients()
            loss = self._backward(batch, random_seed)
        values = torch.zeros(_NUM_VALUES + len(self._is_busy), dtype=torch.float64, device=self.ranks.device)
        values[0], values[1] = loss, float(stop_requested)
        for gradient in self._shards.gradients():
            values[2] += torch.linalg.vector_norm(gradient, dtype=torch.float64).square()
        if self._experts is not None:
            values[_NUM_VALUES:] = self._experts.busy()
        total, stops, squares, *busy = self.ranks.sum_(values).tolist()
        self._is_busy = np.array(busy) > 0
        # DeepSpeed's gradients are means over processes, also those of experts that only some processes hold.
        self._norm = squares**0.5 * self.ranks.size / self._num_targets
        return Gradients(total / self._num_targets, self._norm, stops > 0)

    def step(self, learning_rate: float) -> None:
        """See :meth:`btm.train.engine.Engine.step`."""
        # The fused kernel divides by this on the way: to the mean over targets, and to the norm that is allowed.
        scale = self._num_targets / self.ranks.size * max(1.0, self._norm / self._train.clip_norm)
        with naming_lost_exchanges(), self._optimizer.opened(learning_rate, scale, self._is_busy):
            self._engine.step()
        self._has_gradients = False

    def dev_loss(self, windows: Windows, domain_id: int | None = None) -> DevLoss:
        """See :meth:`btm.train.engine.Engine.dev_loss`."""
        total = torch.zeros(2, dtype=torch.float64, device=self.ranks.device)
        passes: list[ExpertPass] = []
        self.model.eval()
        with naming_lost_exchanges(), torch.no_grad():
            for arrays in self._passes.of_windows(windows):
                inputs, targets = (self._tensor(array) for array in arrays)
                experts = None if self._experts is None else self._experts.dev_pass_of(targets, domain_id)
                total[0] += self._engine.module(inputs, targets, None, experts, by_token=True).double().sum()
                total[1] += (targets != IGNORED).sum()
                passes += [] if experts is None else [experts]
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
        """See :meth:`btm.train.engine.Engine.tensor_files`; every rank calls it, the main rank alone gets tensors.

        They are copies in the memory of the main rank, 12 bytes per weight.
        """
        with naming_lost_exchanges():
            files = {
                file: {tensor_name(kind, name): value for kind in kinds for name, value in self._whole.gathered(kind)}
                for file, kinds in FILES.items()
            }
        if self.ranks.is_main and self._experts is not None:
            model, optimizer = files.values()
            model |= self._experts.kept_buffers()
            experts = self._optimizer.steps.experts
            optimizer |= {f"step.{name}": experts[which] for name, which in self._step_names.items()}
        self._to_fill = files
        return files if self.ranks.is_main else {}

    def tensors_loaded(self, num_optimizer_steps: int) -> None:
        """See :meth:`btm.train.engine.Engine.tensors_loaded`; the main rank tells the others what it loaded."""
        with naming_lost_exchanges():
            for file, kinds in FILES.items():
                for kind in kinds:
                    for name, shape in self._shapes.items():
                        value = taken_from_main(self.ranks, self._to_fill[file], tensor_name(kind, name), shape)
                        self._whole.fill(name, kind, value)
            self._shards.refresh_weights()
            copy_from_main(self.ranks, self._optimizer.steps.experts)
            for buffer in {} if self._experts is None else self._experts.kept_buffers().values():
                copy_from_main(self.ranks, buffer)
        self._to_fill = {}
        self._optimizer.steps.shared = num_optimizer_steps

    def save_model(self, directory: Path, tokenizer_dir: Path) -> None:
        """See :meth:`btm.train.engine.Engine.save_model`."""
        with naming_lost_exchanges():
            self._whole.restore(self.model, self._dtype)
        if self.ranks.is_main:
            save_model(self.model, directory, self._dtype, tokenizer_dir)

    def matmul_peak(self) -> float:
        """See :meth:`btm.train.engine.Engine.matmul_peak`."""
        return matmul_peak_of(self.ranks, self._dtype)

    def _backward(self, batch: Batch, random_seed: int) -> torch.Tensor:
        """Gradients of this rank's passes over ``batch``; returns the sum of their losses."""
        targets_per_token = self._num_targets / max(1, batch.num_input_tokens)
        total = torch.zeros((), dtype=torch.float64, device=self.ranks.device)
        if self._experts is not None:
            self._experts.start_update()
        for one in self._passes.of_batch(batch, random_seed):
            part = one.part
            # Not every model can be told of padding alone; without targets it changes nothing.
            segments = None if batch.segments is None else part.input_segments
            experts = None if self._experts is None else self._experts.pass_of(part)
            self._engine.set_gradient_accumulation_boundary(one.is_last)
            loss = self._engine(
                self._tensor(part.inputs),
                self._tensor(part.targets),
                None if segments is None else self._tensor(segments),
                experts,
            )
            total += loss.detach()
            if self._experts is not None and experts is not None:
                scale = 0.0 if one.is_padding else part.num_input_tokens * targets_per_token
                extra = self._experts.loss(experts, scale)
                loss = loss if extra is None else loss + extra
            self._engine.backward(loss, scale_wrt_gas=False)
            if self._experts is not None:
                self._experts.end_pass()
        if self._experts is not None:
            self._experts.end_update()
        self._has_gradients = True
        return total

    def _drop_gradients(self) -> None:
        """Forget the gradients of an update that was skipped."""
        if self._has_gradients and not self._shards.drop_gradients():
            self._engine.step()
        self._has_gradients = False

    def _tensor(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self.ranks.device, non_blocking=True)


def _check_model(model: PreTrainedModel, config: EngineConfig) -> None:
    problems = engine_problems(config, is_sparse=sparsity_of(model) is not None)
    counts = {module.experts.num_experts for module in expert_modules(model)}
    problems += [problem for count in sorted(counts) for problem in share_problems(config, count)]
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    if frozen:
        problems.append(f"engine=deepspeed trains all weights, got frozen ones ({frozen[0]}); use engine=torch")
    if problems:
        raise ConfigError(problems)
