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
from btm.model.expert_pass import ExpertPass
from btm.model.loss import IGNORED, loss_sum, token_losses
from btm.model.patches import prepare_for_training
from btm.train.engine import DevLoss, Gradients, TensorFiles
from btm.train.expert_training import ExpertTraining, expert_owners
from btm.train.flat import NUM_VALUES, FlatParameters, Span
from btm.train.peak import matmul_peak_of
from btm.train.ranks import Ranks

_MAX_SEED = 2**63
_DTYPES = {Dtype.bf16: torch.bfloat16, Dtype.fp32: torch.float32}


class TorchEngine:
    """fp32 master weights and AdamW (https://arxiv.org/abs/1711.05101) around a model in bf16 or fp32.

    Each rank computes the gradient of the sum of the losses of its rows; the sum over ranks, divided by the number of
    target tokens of the batch, is the gradient of a single process, whatever the number of ranks and micro-batches.
    Experts that no token of an update reached stay as they are, moments and step counts included.
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
        self.flat = FlatParameters(model, ranks.device, self._dtype, expert_owners(model))
        prepare_for_training(model, ranks.device, self._dtype)
        self._experts = ExpertTraining.of(model, ranks)
        self._moments = [torch.zeros_like(self.flat.masters) for _ in range(2)]
        self._spans: dict[Span, torch.nn.Parameter] = {}
        self._optimizer = self._make_optimizer()
        self._num_targets = 1
        self._norm = 0.0
        model.train()

    @property
    def num_optimizer_steps(self) -> int:
        """Optimizer steps taken so far, by the weights that took most of them."""
        return max((int(state["step"].item()) for state in self._optimizer.state.values()), default=0)

    def gradients(self, batch: Batch, *, random_seed: int, stop_requested: bool) -> Gradients:
        """See :meth:`btm.train.engine.Engine.gradients`."""
        torch.manual_seed((random_seed * self.ranks.size + self.ranks.rank) % _MAX_SEED)
        self._num_targets = max(1, sum(batch.domain_tokens.values()))
        self.flat.start_gradients()
        self.flat.extra[0] = self._backward(batch)
        self.flat.extra[1] = float(stop_requested)
        self.flat.finish_gradients()
        self.ranks.sum_(self.flat.gradients_and_extra)
        # The only wait for the device in an update.
        values = [self.flat.extra[:NUM_VALUES].double(), self.flat.gradient_norm()[None]]
        loss, stops, norm = torch.cat(values).tolist()
        self._norm = norm / self._num_targets
        return Gradients(loss / self._num_targets, self._norm, stops > 0)

    def step(self, learning_rate: float) -> None:
        """See :meth:`btm.train.engine.Engine.step`."""
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        busy = self.flat.busy_owners()
        for span, parameter in self._spans.items():
            is_idle = span.owner and span.owner not in busy
            parameter.grad = None if is_idle else self.flat.gradients[span.begin : span.end]
        # The fused kernel divides by this on the way: to the mean over targets, and to the norm that is allowed.
        scale = self._num_targets * max(1.0, self._norm / self._train.clip_norm)
        self._optimizer.grad_scale = torch.tensor(scale, device=self.ranks.device)  # pyright: ignore[reportAttributeAccessIssue]
        self._optimizer.step()
        self.flat.refresh_weights()

    def dev_loss(self, windows: Windows, domain_id: int | None = None) -> DevLoss:
        """See :meth:`btm.train.engine.Engine.dev_loss`."""
        count = self._train.micro_batch_sequences or max(1, self._train.batch_tokens // self._train.sequence_length)
        total = torch.zeros(2, dtype=torch.float64, device=self.ranks.device)
        passes: list[ExpertPass] = []
        self.model.eval()
        for begin in range(self.ranks.rank * count, len(windows.inputs), self.ranks.size * count):
            inputs = self._tensor(windows.inputs[begin : begin + count])
            targets = self._tensor(windows.targets[begin : begin + count])
            if self._experts is not None:
                domain = None if domain_id is None else torch.full_like(inputs[:, 0], domain_id)
                passes.append(ExpertPass(domain=domain, is_real=targets != IGNORED))
            losses = token_losses(self.model, inputs, targets, experts=passes[-1] if passes else None)
            total[0] += losses.double().sum()
            total[1] += (targets >= 0).sum()
        self.model.train()
        loss, num_targets = self.ranks.sum_(total).tolist()
        return DevLoss(loss / max(1.0, num_targets), {} if self._experts is None else self._experts.counts(passes))

    def expert_metrics(self) -> dict[str, float]:
        """See :meth:`btm.train.engine.Engine.expert_metrics`."""
        return {} if self._experts is None else self._experts.metrics(self._num_targets)

    def tensor_files(self) -> TensorFiles:
        """See :meth:`btm.train.engine.Engine.tensor_files`."""
        moments = zip(("exp_avg", "exp_avg_sq"), self._moments, strict=True)
        steps = {span: self._optimizer.state[parameter]["step"] for span, parameter in self._spans.items()}
        return {
            "model.safetensors": {slot.name: slot.view(self.flat.masters) for slot in self.flat.slots},
            "optimizer.safetensors": {
                **{f"{kind}.{slot.name}": slot.view(buffer) for kind, buffer in moments for slot in self.flat.slots},
                **{f"step.{span.name}": step for span, step in steps.items() if span.owner},
            },
        }

    def tensors_loaded(self, num_optimizer_steps: int) -> None:
        """See :meth:`btm.train.engine.Engine.tensors_loaded`."""
        for span, parameter in self._spans.items():
            if not span.owner:
                self._optimizer.state[parameter]["step"].fill_(num_optimizer_steps)
        self.flat.refresh_weights()

    def save_model(self, directory: Path, tokenizer_dir: Path) -> None:
        """See :meth:`btm.train.engine.Engine.save_model`."""
        self.flat.release()
        if self.ranks.is_main:
            save_model(self.model, directory, self._dtype, tokenizer_dir)

    def matmul_peak(self) -> float:
        """See :meth:`btm.train.engine.Engine.matmul_peak`."""
        return matmul_peak_of(self.ranks, self._dtype)

    def _backward(self, batch: Batch) -> torch.Tensor:
        """Gradients of this rank's rows of ``batch``; returns the sum of their losses."""
        rows = BatchSampler.rows(batch, self.ranks.rank, self.ranks.size)
        total = torch.zeros((), dtype=torch.float32, device=self.ranks.device)
        count = self._train.micro_batch_sequences or max(1, len(rows.inputs))
        if self._experts is not None:
            self._experts.start_update()
        for begin in range(0, len(rows.inputs), count):
            total += self._pass(rows.part(slice(begin, begin + count)), self._targets_per_token(batch))
        if self._experts is not None:
            for _ in range(self._num_empty_passes(batch, len(rows.inputs), count)):
                self._pass(batch.padding(), 0.0)
            self._experts.end_update()
        return total

    def _pass(self, part: Batch, targets_per_token: float) -> torch.Tensor:
        segments = part.input_segments
        experts, extra = None, None
        if self._experts is not None:
            domain = None if part.domain is None else self._tensor(part.domain)
            experts = ExpertPass(domain=domain, is_real=None if segments is None else self._tensor(segments > 0))
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

    def _targets_per_token(self, batch: Batch) -> float:
        """Targets of the batch over its tokens: the last token of a document has none."""
        return self._num_targets / max(1, batch.num_input_tokens)

    def _num_empty_passes(self, batch: Batch, num_rows: int, count: int) -> int:
        """Passes of padding that this rank adds so that all run equally many."""
        if self._experts is None or not self._experts.needs_equal_passes:
            return 0
        most_rows = -(-len(batch.tokens) // self.ranks.size)
        most = -(-most_rows // (self._train.micro_batch_sequences or most_rows))
        return most - -(-num_rows // count)

    def _tensor(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self.ranks.device, non_blocking=True)

    def _make_optimizer(self) -> torch.optim.AdamW:
        train = self._train
        groups = []
        for is_decayed in (True, False):
            spans = [span for span in self.flat.spans if span.is_decayed is is_decayed and not span.is_frozen]
            parameters = [torch.nn.Parameter(self.flat.masters[span.begin : span.end]) for span in spans]
            self._spans |= dict(zip(spans, parameters, strict=True))
            if spans:
                groups.append({"params": parameters, "weight_decay": train.weight_decay if is_decayed else 0.0})
        optimizer = torch.optim.AdamW(groups, lr=train.lr, betas=(train.beta1, train.beta2), eps=train.eps, fused=True)
        for span, parameter in self._spans.items():
            part = slice(span.begin, span.end)
            optimizer.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32, device=self.ranks.device),
                "exp_avg": self._moments[0][part],
                "exp_avg_sq": self._moments[1][part],
            }
        return optimizer
