"""Cross-entropy over a vocabulary that is shared out over processes (https://arxiv.org/abs/1909.08053, section 3)."""

from dataclasses import dataclass

import torch
import torch.distributed as dist


@dataclass(frozen=True, slots=True)
class SharedVocabulary:
    """This process's part of a vocabulary: equally many ids on all processes, those of padding at the end."""

    first: int
    """Id of the first token of this process."""
    size: int
    """Of the whole vocabulary; ids from here on are padding."""
    group: dist.ProcessGroup

    def without_padding(self, logits: torch.Tensor) -> torch.Tensor:
        """Columns of this process, [..., V / processes], those of padding replaced by -inf."""
        num_columns = logits.shape[-1]
        if self.first + num_columns <= self.size:
            return logits
        is_padding = torch.arange(num_columns, device=logits.device) >= self.size - self.first
        return logits.masked_fill(is_padding, float("-inf"))

    def losses(self, logits: torch.Tensor, targets: torch.Tensor, write_grad: bool) -> torch.Tensor:
        """Nats of each row, the same bits on all processes. Collective.

        Args:
            logits: Columns of this process, [R, V / processes]; with ``write_grad`` overwritten by their gradient.
            targets: int64 [R] ids, the same on all processes.
            write_grad: Whether gradients are asked for.

        Returns:
            [R], fp32.

        Raises:
            ValueError: If a target is not in the vocabulary.
        """
        if targets.numel() and not 0 <= int(targets.min()) <= int(targets.max()) < self.size:
            raise ValueError(
                f"targets must be in 0 ... {self.size - 1}, got {int(targets.min())} ... {int(targets.max())}; tokens "
                f"and model belong to different vocabularies"
            )
        wide = self.without_padding(logits.float())
        index = targets - self.first
        is_own = ((index >= 0) & (index < wide.shape[1]))[:, None]
        index = index.clamp(0, wide.shape[1] - 1)[:, None]
        picked = wide.gather(1, index).masked_fill(~is_own, 0.0)[:, 0]
        mine = torch.stack([torch.logsumexp(wide, dim=1), picked])
        parts = torch.empty(2 * self.group.size(), len(targets), dtype=mine.dtype, device=mine.device)
        dist.all_gather_into_tensor(parts, mine, group=self.group)
        log_sum, known = torch.logsumexp(parts[::2], dim=0), parts[1::2].sum(0)
        if write_grad:
            gradient = torch.exp(wide - log_sum[:, None])
            gradient.scatter_add_(1, index, -is_own.to(gradient.dtype))
            logits.copy_(gradient)
        return log_sum - known
