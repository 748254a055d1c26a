"""Sums that one call of an ensemble carries: evidence of its tokens, and the mixture of next-token distributions."""

import torch
from torch import Tensor

from btm.ensemble.cache import EnsembleCache


class Reading:
    """The new tokens of one call, and the log-probability that each ELM gives them.

    Attributes:
        counted: Whether a token is evidence: it and the token before it are not padding, ``(B, T)``.
        evidence: Log-probability of each counted token under each ELM, 0 elsewhere: ``(E, B, T)``, float64.
    """

    def __init__(self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, state: EnsembleCache) -> None:
        num_tokens = input_ids.shape[1]
        self.input_ids, self.attention_mask, self.position_ids = input_ids, attention_mask, position_ids
        self.state = state
        real = torch.nn.functional.pad(attention_mask.bool(), (1, 0))
        self.counted = real[:, -num_tokens:] & real[:, -num_tokens - 1 : -1]
        self.evidence = torch.zeros(len(state.elms), *input_ids.shape, dtype=torch.float64, device=input_ids.device)

    def note(self, elm: int, piece: slice, logp: Tensor) -> None:
        """Take in one ELM's log-probabilities ``(rows, piece, V)``, after those of the piece before."""
        rows, before = self.state.rows[elm], self.state.next_logp[elm]
        tokens = self.input_ids[rows, piece, None]
        parts = [logp[:, :-1].gather(-1, tokens[:, 1:]).squeeze(-1)] if logp.shape[1] > 1 else []
        if before is not None:
            parts.insert(0, before.gather(-1, tokens[:, 0]))
        if parts:
            given = (torch.cat(parts, 1) if len(parts) > 1 else parts[0]).clamp_min(torch.finfo(torch.float32).min)
            # The first token of all has no prediction: its column stays 0.
            seen = slice(piece.stop - given.shape[1], piece.stop)
            self.evidence[elm, rows, seen] = torch.where(self.counted[rows, seen], given, 0.0).double()
        # A copy of a long piece: a view would keep all of it alive.
        self.state.next_logp[elm] = logp[:, -1].clone() if logp.shape[1] > 1 else logp[:, -1]

    def finish(self) -> None:
        """Add the evidence to the state, once all ELMs have read."""
        self.state.evidence = self.state.evidence + self.evidence.sum(-1)
        self.state.last = self.evidence[..., -1]
        self.state.has_last = self.counted[:, -1]
        self.state.length += self.input_ids.shape[1]


class Mixture:
    """A mixture to which one component is added after the other, normalised at every moment.

    With joint weights ``a_j`` (log, any scale) it holds ``log sum_j exp(a_j) p_j - log sum_j exp(a_j)``. The weights
    are kept in float64 and only their differences meet the float32 distributions, so that evidence of any size is safe.

    Attributes:
        logp: ``(..., V)``, float32.
    """

    def __init__(self, shape: torch.Size, vocab_size: int, device: torch.device) -> None:
        self._total = torch.full(shape, -torch.inf, dtype=torch.float64, device=device)
        self.logp = torch.full((*shape, vocab_size), -torch.inf, device=device)

    def add(self, index: tuple[Tensor | slice, ...], log_joint: Tensor, logp: Tensor) -> None:
        """Add a component at the positions ``index``: weights ``(...)`` and distributions ``(..., V)``."""
        before = self._total[index]
        total = torch.logaddexp(before, log_joint)
        # -inf - -inf: nothing there yet, and nothing comes.
        scale = torch.stack([before, log_joint]).sub_(total).nan_to_num_(nan=-torch.inf).float()[..., None]
        self.logp[index] = torch.logaddexp(self.logp[index] + scale[0], logp + scale[1])
        self._total[index] = total
