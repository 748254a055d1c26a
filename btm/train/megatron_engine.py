"""The engine for models whose layers outgrow one device: Megatron-Core's tensor parallelism for dense models.

``engine.tensor_parallel`` processes share out every layer of Megatron-Core's ``GPTModel``; the others run further
sequences, with fp32 masters and moments shared out among them (ZeRO 1). Loss convention, clipping, AdamW and
checkpoints are those of :class:`btm.train.torch_engine.TorchEngine`: whole fp32 tensors under Hugging Face names, as
safetensors, so that a run can go on under another engine, another number of processes or another
``engine.tensor_parallel``.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from transformers import PreTrainedModel

from btm.config_model import Dtype, EngineConfig
from btm.config_train import TrainConfig
from btm.corpus.sampler import Batch, BatchSampler
from btm.corpus.windows import Windows
from btm.errors import ConfigError
from btm.model.causal_lm import flops_per_token, num_parameters, save_model
from btm.train.engine import DevLoss, Gradients, TensorFiles
from btm.train.gathered_tensors import FILES, Files, taken_from_main, tensor_name
from btm.train.megatron_flat import FlatSlice
from btm.train.megatron_gpt import GptLosses
from btm.train.megatron_mapping import Entry, entries_of, join, missing_names, split
from btm.train.megatron_shape import check_division, frequencies_of, shape_of
from btm.train.megatron_start import answering_for_cuda, join_mesh
from btm.train.peak import matmul_peak_of
from btm.train.ranks import Ranks, naming_lost_exchanges

_DTYPES = {Dtype.bf16: torch.bfloat16, Dtype.fp32: torch.float32}


class MegatronEngine:
    """fp32 master weights and AdamW around Megatron-Core's ``GPTModel`` in bf16 or fp32.

    All tensor-parallel processes of a group see the same sequences; groups share out the rows of a batch.
    """

    def __init__(self, model: PreTrainedModel, *, train: TrainConfig, config: EngineConfig, ranks: Ranks) -> None:
        """Take over ``model`` (fp32, on the CPU).

        Args:
            model: What to train; its weights move into Megatron's model and come back in :meth:`save_model`.
            train: Recipe.
            config: Arithmetic, and how many processes share out a layer.
            ranks: The processes that run this model.

        Raises:
            ConfigError: If Megatron cannot compute this model, or its sizes do not divide.
            TrainingError: If Megatron-Core is not installed.
        """
        self._shape = shape_of(model, sequence_length=train.sequence_length)
        self._entries = entries_of(self._shape)
        _check_processes(ranks.size, config.tensor_parallel)
        check_division(
            self._shape,
            config.tensor_parallel,
            is_sequence_parallel=config.sequence_parallel,
            sequence_length=train.sequence_length,
        )
        self._hf_parameters = dict(model.named_parameters())
        unknown = missing_names(self._entries, self._hf_parameters)
        if unknown:
            raise ConfigError(
                [f"engine=megatron does not know what {unknown[0]} of this {model.config.model_type} model is; "
                 f"use engine=torch"]
            )  # fmt: skip
        self.ranks = ranks
        self.model = model
        self.num_parameters = num_parameters(model)
        self.flops_per_token = flops_per_token(model, train.sequence_length)
        self.num_optimizer_steps = 0
        self._train = train
        self._dtype = _DTYPES[config.dtype]
        self._is_sequence_parallel = config.sequence_parallel
        self._num_targets = 1
        self._norm = 0.0
        self._to_fill: Files = {}
        with self._guarded():
            self._mesh = join_mesh(ranks, config.tensor_parallel)
            self._losses = GptLosses(
                self._shape,
                self._mesh,
                frequencies=frequencies_of(model),
                dtype=self._dtype,
                device=ranks.device,
                is_sequence_parallel=config.sequence_parallel,
                is_checkpointed=train.activation_checkpointing,
            )
            self._flat = self._make_flat()
        self._losses.train()

    @property
    def losses(self) -> GptLosses:
        """Megatron's model with its loss."""
        return self._losses

    def gradients(self, batch: Batch, *, random_seed: int, stop_requested: bool) -> Gradients:
        """See :meth:`btm.train.engine.Engine.gradients`."""
        del random_seed  # there is no dropout
        self._to_fill = {}  # as large as a checkpoint
        self._num_targets = max(1, sum(batch.domain_tokens.values()))
        self._flat.start_gradients()
        with self._guarded():
            loss = self._backward(batch)
            squares = self._flat.reduce_gradients()
        values = torch.stack([self._counted_once(loss), torch.full_like(loss, float(stop_requested)), squares])
        total, stops, squares = self.ranks.sum_(values).tolist()
        self._norm = squares**0.5 / self._num_targets
        return Gradients(total / self._num_targets, self._norm, stops > 0)

    def step(self, learning_rate: float) -> None:
        """See :meth:`btm.train.engine.Engine.step`."""
        with self._guarded():
            self._flat.step(learning_rate, self._num_targets * max(1.0, self._norm / self._train.clip_norm))
        self.num_optimizer_steps += 1

    def dev_loss(self, windows: Windows, domain_id: int | None = None) -> DevLoss:
        """See :meth:`btm.train.engine.Engine.dev_loss`."""
        del domain_id
        count = self._train.micro_batch_sequences or max(1, self._train.batch_tokens // self._train.sequence_length)
        total = torch.zeros(2, dtype=torch.float64, device=self.ranks.device)
        mesh = self._mesh
        self._losses.eval()
        with self._guarded(), torch.no_grad():
            for begin in range(mesh.data_rank * count, len(windows.inputs), mesh.data_size * count):
                targets = self._tensor(windows.targets[begin : begin + count])
                inputs = self._tensor(windows.inputs[begin : begin + count])
                losses = self._losses(inputs, targets, None, by_token=True)
                total[0] += losses.double().sum()
                total[1] += (targets >= 0).sum()
        self._losses.train()
        loss, num_targets = self.ranks.sum_(self._counted_once(total)).tolist()
        return DevLoss(loss / max(1.0, num_targets), {})

    def expert_metrics(self) -> dict[str, float]:
        """See :meth:`btm.train.engine.Engine.expert_metrics`."""
        return {}

    def tensor_files(self) -> TensorFiles:
        """See :meth:`btm.train.engine.Engine.tensor_files`; every rank calls it, the main rank alone gets tensors.

        They are copies in the memory of the main rank, 12 bytes per weight.
        """
        files: dict[str, dict[str, torch.Tensor]] = {}
        for file, kinds in FILES.items():
            named = ((kind, name, value) for kind in kinds for name, value in self._gathered(kind))
            files[file] = {tensor_name(kind, name): value for kind, name, value in named}
        self._to_fill = files
        return files if self.ranks.is_main else {}

    def tensors_loaded(self, num_optimizer_steps: int) -> None:
        """See :meth:`btm.train.engine.Engine.tensors_loaded`; the main rank tells the others what it loaded."""
        with self._guarded():
            for file, kinds in FILES.items():
                for kind in kinds:
                    for entry in self._entries:
                        self._fill(entry, kind, [self._from_main(file, kind, name) for name in entry.sources])
            self._flat.refresh_weights()
        self._to_fill = {}
        self._flat.set_step(num_optimizer_steps)
        self.num_optimizer_steps = num_optimizer_steps

    def save_model(self, directory: Path, tokenizer_dir: Path) -> None:
        """See :meth:`btm.train.engine.Engine.save_model`."""
        for name, value in self._gathered(None):
            self._hf_parameters[name].data = value.to(self._dtype)
        if self.ranks.is_main:
            save_model(self.model, directory, self._dtype, tokenizer_dir)

    def matmul_peak(self) -> float:
        """See :meth:`btm.train.engine.Engine.matmul_peak`."""
        return matmul_peak_of(self.ranks, self._dtype)

    def _make_flat(self) -> FlatSlice:
        """Buffers with the weights of the transformers model, which gives its memory away."""
        flat = FlatSlice(
            dict(self._losses.gpt.named_parameters()),
            self._entries,
            self._mesh,
            train=self._train,
            dtype=self._dtype,
            device=self.ranks.device,
            has_parts=self._is_sequence_parallel,
        )
        self._sizes = {name: parameter.shape for name, parameter in self._hf_parameters.items()}
        self._flat = flat
        for entry in self._entries:
            self._fill(entry, None, [self._hf_parameters[name].detach() for name in entry.sources])
        for parameter in self._hf_parameters.values():
            parameter.data = parameter.data.new_empty(0)
        flat.refresh_weights()
        return flat

    def _backward(self, batch: Batch) -> torch.Tensor:
        """Gradients of the rows of this process's group; returns the sum of their losses, fp64."""
        rows = BatchSampler.rows(batch, self._mesh.data_rank, self._mesh.data_size)
        total = torch.zeros((), dtype=torch.float64, device=self.ranks.device)
        count = self._train.micro_batch_sequences or max(1, len(rows.inputs))
        for begin in range(0, len(rows.inputs), count):
            part = rows.part(slice(begin, begin + count))
            segments = None if part.input_segments is None else self._tensor(part.input_segments)
            loss = self._losses(self._tensor(part.inputs), self._tensor(part.targets), segments)
            loss.backward()
            total += loss.detach()
        return total

    def _gathered(self, kind: str | None) -> Iterator[tuple[str, torch.Tensor]]:
        """On the main rank whole masters (None) or moments by Hugging Face name, on the CPU; every rank runs it."""
        mesh = self._mesh
        with self._guarded():
            flat = self._flat.whole(kind)
            if mesh.data_rank > 0:
                return
            for entry in self._entries:
                own = self._flat.slots[entry.name].view(flat)
                shards = [torch.empty_like(own) for _ in range(mesh.tensor_size)] if mesh.tensor_rank == 0 else None
                if mesh.tensor_size == 1:
                    shards = [own]
                else:
                    dist.gather(own, shards, dst=0, group=mesh.tensor_group)
                if shards is not None:
                    for name, value in join(entry, shards, self._shape).items():
                        yield name, value.to("cpu", copy=True)

    def _from_main(self, file: str, kind: str | None, name: str) -> torch.Tensor:
        return taken_from_main(self.ranks, self._to_fill[file], tensor_name(kind, name), self._sizes[name])

    def _fill(self, entry: Entry, kind: str | None, tensors: list[torch.Tensor]) -> None:
        shards = split(entry, tensors, self._shape, self._mesh.tensor_size)
        self._flat.fill(entry.name, kind, shards[self._mesh.tensor_rank])

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


def _check_processes(num_processes: int, tensor_parallel: int) -> None:
    if num_processes % tensor_parallel:
        raise ConfigError(
            [f"engine.tensor_parallel={tensor_parallel} must divide the {num_processes} processes that run this model; "
             f"set engine.num_processes to a multiple of it"]
        )  # fmt: skip
