"""Auxiliary losses of routers. One convention for balance: 1.0 = balanced, E = all tokens on one expert.

Shapes: T tokens, E experts.
"""

import torch
import torch.distributed as dist

from moe_kernels.types import Routing


def _mean_probs(routing: Routing) -> torch.Tensor:
    assert routing.probs_TE is not None
    mask_T1 = routing.is_real_T.unsqueeze(1)
    return (routing.probs_TE * mask_T1).sum(0) / mask_T1.sum().clamp(min=1)


def load_fractions(counts_E: torch.Tensor) -> torch.Tensor:
    """Share of the routed copies that each expert got, summing to 1; uniform where there are none.

    Args:
        counts_E: Routed copies per expert ``(E,)``.

    Returns:
        Shares ``(E,)``, float32.
    """
    total = counts_E.sum()
    uniform_E = torch.full_like(counts_E, 1.0 / counts_E.numel(), dtype=torch.float32)
    return torch.where(total > 0, counts_E.float() / total.clamp(min=1), uniform_E)


def load_balancing_loss(routing: Routing, fraction_E: torch.Tensor | None = None) -> torch.Tensor:
    """``E * sum_e f_e * P_e``: share of copies times mean router probability.

    With the shares of this batch it is the loss of Switch Transformers (https://arxiv.org/abs/2101.03961, section 2.2);
    with shares over the global batch, from a `BalanceBuffer`, that of Qiu et al. 2025
    (https://arxiv.org/abs/2501.11873). The mean over ranks of equally many tokens is then exactly the loss of the
    global batch. Padding counts in neither factor.

    Args:
        routing: Routing before any capacity; its ``probs_TE`` must be set.
        fraction_E: Shares to use instead of this batch's ``(E,)``, without gradient.

    Returns:
        Scalar with gradient; 1.0 = balanced. Zero gradient where the router has no probabilities.
    """
    if routing.probs_TE is None:
        return routing.weight_N.new_zeros(())
    if fraction_E is None:
        fraction_E = load_fractions(routing.expert_counts())
    return routing.num_experts * (fraction_E * _mean_probs(routing)).sum()


def z_loss(routing: Routing) -> torch.Tensor:
    """Mean squared log-sum-exp of the router logits (ST-MoE, https://arxiv.org/abs/2202.08906, section 3.1).

    Args:
        routing: Routing with ``logits_TE``.

    Returns:
        Scalar with gradient, over real tokens only; zero where the router has no logits.
    """
    if routing.logits_TE is None:
        return routing.weight_N.new_zeros(())
    square_T = torch.logsumexp(routing.logits_TE.float(), dim=1).square() * routing.is_real_T
    return square_T.sum() / routing.is_real_T.sum().clamp(min=1)


class BalanceBuffer(torch.nn.Module):
    """Loads over the global batch: all ranks of a group, and the micro-batches of one update so far.

    `observe` may be called again for the same micro-batch, as activation checkpointing does: it counts once. Call
    `next_micro_batch` after each backward and `reset` after each update, taken or skipped. The state is in
    ``state_dict``, so training resumes in the middle of an update.

    Args:
        num_experts: Experts of the layer.
        group: Process group over which loads are summed; ``None`` for this process alone.
    """

    before_E: torch.Tensor
    current_E: torch.Tensor

    def __init__(self, num_experts: int, group: dist.ProcessGroup | None = None) -> None:
        super().__init__()
        self.group = group
        self.register_buffer("before_E", torch.zeros(num_experts, dtype=torch.int64))
        self.register_buffer("current_E", torch.zeros(num_experts, dtype=torch.int64))

    def observe(self, counts_E: torch.Tensor) -> torch.Tensor:
        """Count a micro-batch. Collective: all ranks of the group must call.

        Args:
            counts_E: This rank's routed copies per expert ``(E,)``, int64.

        Returns:
            Shares over all ranks and all micro-batches of this update so far ``(E,)``, float32.
        """
        total_E = counts_E.detach().clone()
        if self.group is not None:
            dist.all_reduce(total_E, group=self.group)
        self.current_E.copy_(total_E)
        return load_fractions(self.before_E + self.current_E)

    def next_micro_batch(self) -> None:
        """Close the micro-batch: what was observed last stays in the sum."""
        self.before_E += self.current_E
        self.current_E.zero_()

    def reset(self) -> None:
        """Forget all loads; the next update starts."""
        self.before_E.zero_()
        self.current_E.zero_()
