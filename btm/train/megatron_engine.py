"""The engine for models whose layers outgrow one device: Megatron-Core's tensor parallelism.

``engine.tensor_parallel`` processes share out every layer of Megatron-Core's ``GPTModel``; the others run further
sequences, with fp32 masters and moments shared out among them (ZeRO 1). Loss convention, clipping, AdamW and
checkpoints are those of :class:`btm.train.torch_engine.TorchEngine`: whole fp32 tensors under Hugging Face names, as
safetensors, so that a run can go on under another engine, another number of processes or another
``engine.tensor_parallel``.
"""

import contextlib
import functools
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel

from btm.config_model import EngineConfig
from btm.config_train import TrainConfig
from btm.corpus.sampler import Batch
from btm.corpus.windows import Windows
from btm.model.causal_lm import flops_per_token, num_parameters, save_model
from btm.model.expert_block import supply_pass
from btm.model.expert_pass import EXPERTS, ExpertPass
from btm.train.engine import DevLoss, Gradients, TensorFiles
from btm.train.expert_owners import num_experts, step_names
from btm.train.expert_training import ExpertTraining
from btm.train.gathered_tensors import FILES, Files, copy_from_main, taken_from_main, tensor_name
from btm.train.megatron_build import DTYPES, build, checked_shape
from btm.train.megatron_expert_width import bring_together
from btm.train.megatron_gpt import GptLosses
from btm.train.megatron_start import answering_for_cuda, join_mesh
from btm.train.passes import Passes
from btm.train.peak import matmul_peak_of
from btm.train.ranks import Ranks, naming_lost_exchanges

_NUM_VALUES = 3


class MegatronEngine:
    """fp32 master weights and AdamW around Megatron-Core's ``GPTModel`` in bf16 or fp32.

    All tensor-parallel processes of a group see the same sequences; groups share out the passes of a batch. The model
    may have expert layers: tensor-parallel processes share out the width of each expert, ``engine.expert_parallel``
    groups the experts, and those that no token of an update reached stay as they are, moments and step counts included.
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
            model: What to train; its weights move into Megatron's model and come back in :meth:`save_model`.
            train: Recipe.
            config: Arithmetic, and how many processes share out a layer.
            ranks: The processes that run this model.
            passes: Sequences of each pass of an update, in the order of the batch; None divides what each group has by
                ``train.micro_batch_sequences``.
            token_classes: Class of each token id, int64 [vocabulary], by which the tokens of experts are counted.

        Raises:
            ConfigError: If Megatron cannot compute this model, or its sizes do not divide.
            TrainingError: If Megatron-Core is not installed.
        """
        shape = checked_shape(model, train, config, ranks.size)
        self._sizes = {name: parameter.shape for name, parameter in model.named_parameters()}
        self.ranks = ranks
        self.model = model
        self.num_parameters = num_parameters(model)
        self.flops_per_token = flops_per_token(model, train.sequence_length)
        self._train = train
        self._dtype = DTYPES[config.dtype]
        self._is_sequence_parallel = config.sequence_parallel
        self._step_names = step_names(model)
        self._is_busy = np.zeros(num_experts(model), dtype=bool)
        self._num_targets = 1
        self._norm = 0.0
        self._to_fill: Files = {}
        with self._guarded():
            self._mesh = join_mesh(ranks, config.tensor_parallel, config.expert_parallel)
            built = build(model, shape, self._mesh, train=train, config=config, device=ranks.device)
        self._losses, self._state, self._shares = built.losses, built.state, built.shares
        self._losses.train()
        mesh = self._mesh
        data_ranks = Ranks(mesh.data_rank, mesh.data_size, ranks.device, mesh.data_group)
        are_divided = mesh.expert_size > 1
        self._experts = ExpertTraining.of(model, data_ranks, are_divided=are_divided, token_classes=token_classes)
        self._passes = Passes.of(
            model,
            train,
            data_ranks,
            sizes=passes,
            num_shares=config.expert_parallel,
            are_equal=self._experts is not None and self._experts.needs_equal_passes,
            dev_are_equal=are_divided,
        )

    @property
    def losses(self) -> GptLosses:
        """Megatron's model with its loss."""
        return self._losses

    @property
    def num_optimizer_steps(self) -> int:
        """Optimizer steps taken so far."""
        return self._state.steps.shared

    def gradients(self, batch: Batch, *, random_seed: int, stop_requested: bool) -> Gradients:
        """See :meth:`btm.train.engine.Engine.gradients`."""
        self._to_fill = {}  # as large as a checkpoint
        self._num_targets = max(1, sum(batch.domain_tokens.values()))
        self._state.start_gradients()
        with self._guarded():
            loss = self._backward(batch, random_seed)
            squares = self._state.reduce_gradients()
        values = torch.zeros(_NUM_VALUES + len(self._is_busy), dtype=torch.float64, device=self.ranks.device)
        values[0], values[1], values[2] = self._counted_once(loss), float(stop_requested), squares
        if self._experts is not None:
            values[_NUM_VALUES:] = self._experts.busy()
        total, stops, squares, *busy = self.ranks.sum_(values).tolist()
        self._is_busy = np.array(busy) > 0
        self._norm = squares**0.5 / self._num_targets
        return Gradients(total / self._num_targets, self._norm, stops > 0)

    def step(self, learning_rate: float) -> None:
        """See :meth:`btm.train.engine.Engine.step`."""
        divisor = self._num_targets * max(1.0, self._norm / self._train.clip_norm)
        with self._guarded():
            self._state.step(learning_rate, divisor, self._is_busy)

    def dev_loss(self, windows: Windows, domain_id: int | None = None) -> DevLoss:
        """See :meth:`btm.train.engine.Engine.dev_loss`."""
        total = torch.zeros(2, dtype=torch.float64, device=self.ranks.device)
        passes: list[ExpertPass] = []
        self._losses.eval()
        with self._guarded(), torch.no_grad():
            for arrays in self._passes.of_windows(windows):
                inputs, targets = (self._tensor(array) for array in arrays)
                experts = None if self._experts is None else self._experts.dev_pass_of(targets, domain_id)
                total[0] += self._losses(inputs, targets, None, self._begun(experts, inputs), True).double().sum()
                total[1] += (targets >= 0).sum()
                passes += [] if experts is None else [experts]
        self._losses.train()
        loss, num_targets = self.ranks.sum_(self._counted_once(total)).tolist()
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
        with self._guarded():
            files = {
                file: {tensor_name(kind, name): value for kind in kinds for name, value in self._state.gathered(kind)}
                for file, kinds in FILES.items()
            }
        if self.ranks.is_main and self._experts is not None:
            model, optimizer = files.values()
            model |= self._experts.kept_buffers()
            optimizer |= {f"step.{name}": self._state.steps.experts[which] for name, which in self._step_names.items()}
        self._to_fill = files
        return files if self.ranks.is_main else {}

    def tensors_loaded(self, num_optimizer_steps: int) -> None:
        """See :meth:`btm.train.engine.Engine.tensors_loaded`; the main rank tells the others what it loaded."""
        with self._guarded():
            for file, kinds in FILES.items():
                for kind in kinds:
                    self._state.fill(kind, functools.partial(self._from_main, file, kind))
            self._state.refresh_weights()
            copy_from_main(self.ranks, self._state.steps.experts)
            for buffer in {} if self._experts is None else self._experts.kept_buffers().values():
                copy_from_main(self.ranks, buffer)
        self._to_fill = {}
        self._state.set_steps(num_optimizer_steps)

    def save_model(self, directory: Path, tokenizer_dir: Path) -> None:
        """See :meth:`btm.train.engine.Engine.save_model`."""
        with self._guarded():
            whole = {name: value.to(self._dtype) for name, value in self._state.gathered(None)}
        if self.ranks.is_main:
            bring_together(self.model)
            self._shares.bring_together(self.model, whole)
            for name, parameter in self.model.named_parameters():
                parameter.data = whole[name]
            save_model(self.model, directory, self._dtype, tokenizer_dir)

    def matmul_peak(self) -> float:
        """See :meth:`btm.train.engine.Engine.matmul_peak`."""
        return matmul_peak_of(self.ranks, self._dtype)

    def _backward(self, batch: Batch, random_seed: int) -> torch.Tensor:
        """Gradients of the passes of this process's group; returns the sum of their losses, fp64."""
        targets_per_token = self._num_targets / max(1, batch.num_input_tokens)
        total = torch.zeros((), dtype=torch.float64, device=self.ranks.device)
        if self._experts is not None:
            self._experts.start_update()
        for one in self._passes.of_batch(batch, random_seed):
            total += self._pass(one.part, 0.0 if one.is_padding else targets_per_token)
        if self._experts is not None:
            self._experts.end_update()
        return total

    def _pass(self, part: Batch, targets_per_token: float) -> torch.Tensor:
        inputs, targets = self._tensor(part.inputs), self._tensor(part.targets)
        segments = None if part.input_segments is None else self._tensor(part.input_segments)
        if self._experts is None:
            loss = self._losses(inputs, targets, segments)
            loss.backward()
            return loss.detach()
        experts = self._experts.pass_of(part)
        loss = self._losses(inputs, targets, segments, self._begun(experts, inputs))
        extra = self._experts.loss(experts, part.num_input_tokens * targets_per_token)
        (loss if extra is None else loss + extra).backward()
        self._experts.end_pass()
        return loss.detach()

    def _begun(self, experts: ExpertPass | None, inputs: torch.Tensor) -> ExpertPass | None:
        """The pass with its tokens, as a call of the transformers model begins it."""
        if experts is not None:
            supply_pass(self.model.base_model, (inputs,), {EXPERTS: experts})
        return experts

    def _from_main(self, file: str, kind: str | None, name: str) -> torch.Tensor:
        return taken_from_main(self.ranks, self._to_fill[file], tensor_name(kind, name), self._sizes[name])

    def _counted_once(self, values: torch.Tensor) -> torch.Tensor:
        """``values``, which all tensor-parallel processes of a group have, as a summand of a sum over all processes."""
        return values if self._mesh.tensor_rank == 0 else torch.zeros_like(values)

    def _tensor(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self.ranks.device, non_blocking=True)

    @contextlib.contextmanager
    def _guarded(self) -> Iterator[None]:
        """Around everything that Megatron and its exchanges do."""
        with naming_lost_exchanges():
            if self._is_sequence_parallel:
                with answering_for_cuda(self.ranks.device):
                    yield
            else:
                yield
