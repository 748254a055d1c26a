"""What training adds for models with expert layers: labels, auxiliary losses, loads over processes, statistics."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from btm.config_ffn import Balance, FfnConfig
from btm.corpus.sampler import Batch
from btm.model.expert_block import expert_modules
from btm.model.expert_pass import ExpertPass, LayerReport
from btm.model.learning_routers import DEPTH_ACCURACY, DEPTH_LOSS, ROUTER_ACCURACY, ROUTER_LOSS
from btm.model.loss import IGNORED
from btm.model.sparse_lm import kept_buffers, sparsity_of
from btm.train.ranks import Ranks
from moe_kernels.losses import BalanceBuffer
from moe_kernels.prices import RunningPrices

LOSSES = ("load_balance", "z", ROUTER_LOSS, DEPTH_LOSS, ROUTER_ACCURACY, DEPTH_ACCURACY)
LOSS_WEIGHTS = ("load_balance_weight", "z_weight", "auxiliary_weight")
"""Keys of ``ffn`` that belong to a training rather than to a model."""
_TOTALS = ("tokens", "dropped", "unrouted")


def loss_weights(ffn: FfnConfig) -> dict[str, float]:
    """Weight of each auxiliary loss."""
    return {
        "load_balance": ffn.load_balance_weight,
        "z": ffn.z_weight,
        ROUTER_LOSS: ffn.auxiliary_weight,
        DEPTH_LOSS: ffn.auxiliary_weight,
    }


@dataclass
class ExpertTraining:
    """The expert layers of the model that an engine trains.

    The engine sums losses over targets and divides by their number at the end. An auxiliary loss is a mean over the
    tokens of one pass, so it enters with the pass's share of the tokens, counted in targets of the whole batch: the
    total is then the mean over all passes of all processes, whatever their sizes.
    """

    model: nn.Module
    ranks: Ranks
    weights: Mapping[str, float]
    needs_equal_passes: bool
    """Whether the layers exchange something in their forward, so that all processes must run it equally often."""
    token_classes: torch.Tensor | None = None
    """Class of each token id; None where classes are not asked for."""
    _sums: dict[int, torch.Tensor] = field(default_factory=dict)

    @staticmethod
    def of(
        model: nn.Module, ranks: Ranks, *, are_divided: bool = False, token_classes: torch.Tensor | None = None
    ) -> "ExpertTraining | None":
        """The expert layers of ``model``; None for a dense one.

        Args:
            model: What is trained.
            ranks: The processes that train it.
            are_divided: Whether its experts are divided over processes.
            token_classes: Class of each token id, int64 [vocabulary], for :meth:`class_counts`.
        """
        sparsity = sparsity_of(model)
        if sparsity is None:
            return None
        shared = ranks.size > 1 and sparsity.ffn.balance is Balance.globally
        training = ExpertTraining(model, ranks, loss_weights(sparsity.ffn), shared or are_divided)
        if token_classes is not None:
            training.token_classes = token_classes.to(ranks.device)
        if ranks.size > 1:
            for buffer in training._prices() + (training._buffers() if shared else []):
                buffer.group = ranks.group or dist.group.WORLD
        return training

    def pass_of(self, part: Batch) -> ExpertPass:
        """Labels of the tokens of some sequences of an update."""
        domain, segments = part.domain, part.input_segments
        return ExpertPass(
            domain=None if domain is None else torch.from_numpy(domain).to(self.ranks.device),
            is_real=None if segments is None else torch.from_numpy(segments > 0).to(self.ranks.device),
        )

    def dev_pass_of(self, targets: torch.Tensor, domain_id: int | None) -> ExpertPass:
        """Labels of the tokens of dev documents of one domain, or of none that the model knows."""
        domain = None if domain_id is None else torch.full_like(targets[:, 0], domain_id)
        return ExpertPass(domain=domain, is_real=targets != IGNORED)

    def start_update(self) -> None:
        """Forget the statistics of the update before."""
        self._sums = {}

    def loss(self, experts: ExpertPass, scale: float) -> torch.Tensor | None:
        """Auxiliary losses of a pass in the scale of a sum over targets.

        Args:
            experts: After the forward.
            scale: Targets that the pass stands for.

        Returns:
            Scalar with gradient; None where the layers have none.
        """
        for block, report in experts.reports.items():
            self._add(block, report, scale)
        loss = experts.loss(self.weights)
        return None if loss is None else loss * scale

    def end_pass(self) -> None:
        """After the backward of a pass: its loads join those of the update."""
        for buffer in (*self._buffers(), *self._prices()):
            buffer.next_micro_batch()

    def end_update(self) -> None:
        """After the last backward: the next update starts from nothing. Every process calls it."""
        for buffer in self._buffers():
            buffer.reset()
        for prices in self._prices():
            prices.end_update()

    def kept_buffers(self) -> dict[str, torch.Tensor]:
        """What the layers learn beside their parameters and checkpoints must hold, by the names of the model."""
        return kept_buffers(self.model)

    def busy(self) -> torch.Tensor:
        """1 for each expert of the model that a token of this process's passes reached, fp32, by block."""
        parts = [torch.zeros(0, device=self.ranks.device)]
        for module in expert_modules(self.model):
            size = module.experts.num_experts
            sums = self._sums.get(module.block)
            parts.append(torch.zeros(size, device=self.ranks.device) if sums is None else (sums[:size] > 0).float())
        return torch.cat(parts)

    def metrics(self, num_targets: int) -> dict[str, float]:
        """Statistics of the last update over all processes, by ``experts/<block>/<what>``.

        ``load`` is the largest expert's over the mean (1 = balanced), ``dropped`` and ``unrouted`` are shares,
        ``entropy`` is that of the load relative to a uniform one. Every process calls it.

        Args:
            num_targets: Targets of the update.
        """
        rows: dict[str, float] = {}
        for block, sums in self._reduced().items():
            counts, rest = sums[: -len(_TOTALS) - len(LOSSES)], sums[-len(_TOTALS) - len(LOSSES) :].tolist()
            tokens, dropped, unrouted = rest[: len(_TOTALS)]
            total = max(1.0, float(counts.sum()))
            values = {
                "load": float(counts.max()) * len(counts) / total,
                "entropy": _relative_entropy(counts / total),
                "dropped": dropped / max(1.0, total + dropped),
                "unrouted": unrouted / max(1.0, tokens),
            }
            for name, value in zip(LOSSES, rest[len(_TOTALS) :], strict=True):
                if value:
                    values[name] = value / max(1, num_targets)
            rows |= {f"experts/{block}/{what}": value for what, value in values.items()}
        return rows

    def counts(self, passes: list[ExpertPass]) -> dict[int, list[int]]:
        """Tokens per expert of each layer in some passes of all processes. Every process calls it.

        Args:
            passes: After their forwards; a process may have none.
        """
        result = {}
        for module in expert_modules(self.model):
            total = torch.zeros(module.experts.num_experts, dtype=torch.float64, device=self.ranks.device)
            for experts_pass in passes:
                total += experts_pass.reports[module.block].statistics.counts_E
            result[module.block] = [int(count) for count in self.ranks.sum_(total).tolist()]
        return result

    def class_counts(self, passes: list[ExpertPass]) -> dict[int, np.ndarray]:
        """Tokens per class and expert, int64 [classes, E], of each layer in some passes of all processes.

        Empty without :attr:`token_classes`. Every process calls it.

        Args:
            passes: After their forwards; a process may have none.
        """
        if self.token_classes is None:
            return {}
        num_classes = int(self.token_classes.max()) + 1
        result = {}
        for module in expert_modules(self.model):
            num_experts = module.experts.num_experts
            total = torch.zeros(num_classes * num_experts, dtype=torch.float64, device=self.ranks.device)
            for experts_pass in passes:
                routed = experts_pass.reports[module.block].statistics
                token_ids = experts_pass.info.token_id_T
                assert token_ids is not None
                cells = self.token_classes[token_ids[routed.token_N]] * num_experts + routed.expert_N
                total += torch.bincount(cells, minlength=len(total))
            counts = self.ranks.sum_(total).reshape(num_classes, num_experts)
            result[module.block] = counts.cpu().numpy().round().astype(np.int64)
        return result

    def _add(self, block: int, report: LayerReport, scale: float) -> None:
        statistics = report.statistics
        totals = (statistics.num_tokens, statistics.num_dropped, statistics.num_unrouted)
        losses = [report.losses[name].detach().double() * scale if name in report.losses else 0.0 for name in LOSSES]
        tail = torch.stack([torch.as_tensor(value, dtype=torch.float64) for value in (*totals, *losses)])
        values = torch.cat([statistics.counts_E.double(), tail.to(statistics.counts_E.device)])
        self._sums[block] = self._sums[block] + values if block in self._sums else values

    def _reduced(self) -> dict[int, torch.Tensor]:
        blocks = expert_modules(self.model)
        sizes = [module.experts.num_experts for module in blocks]
        width = len(_TOTALS) + len(LOSSES)
        parts = [
            self._sums.get(module.block, torch.zeros(size + width, dtype=torch.float64, device=self.ranks.device))
            for module, size in zip(blocks, sizes, strict=True)
        ]
        total = self.ranks.sum_(torch.cat(parts)).cpu()
        return dict(
            zip([module.block for module in blocks], total.split([size + width for size in sizes]), strict=True)
        )

    def _buffers(self) -> list[BalanceBuffer]:
        return [module for module in self.model.modules() if isinstance(module, BalanceBuffer)]

    def _prices(self) -> list[RunningPrices]:
        return [module for module in self.model.modules() if isinstance(module, RunningPrices)]


def _relative_entropy(share: torch.Tensor) -> float:
    if len(share) == 1:
        return 1.0
    return float(torch.special.entr(share).sum() / torch.log(torch.tensor(float(len(share)), dtype=torch.float64)))
