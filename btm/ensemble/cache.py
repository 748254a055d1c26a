"""What generation with an ensemble remembers between two calls: one KV cache per ELM, and the posterior's evidence.

``transformers.generate`` carries this object as ``past_key_values``; beam search reorders it like any other cache.
An ELM's KV cache holds only the rows (sequences of the batch) for which the ELM is active.
"""

from collections.abc import Sequence
from typing import NoReturn

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedConfig


class EnsembleCache(Cache):
    """State of ``E`` ELMs on ``B`` sequences.

    Attributes:
        elms: KV cache of each ELM, of its active rows in ascending order.
        active: Whether an ELM reads a row: ``(E, B)``, bool.
        rows: The same per ELM as an index: ascending row numbers, or a whole slice.
        selected: Whether the ``top_k`` ELMs of each row have been chosen.
        evidence: Sum of log-probabilities (nats, not tempered) that an ELM gave the row so far: ``(E, B)``, float64.
        last: Log-probability of the newest token alone: ``(E, B)``, float64; 0 where it was not scored.
        has_last: Whether the newest token of a row was scored: ``(B,)``, bool.
        next_logp: Each ELM's log-probabilities of the next token of its active rows: ``(rows, V)``, float32.
        length: Positions read, padding included.
    """

    def __init__(self, configs: Sequence[PreTrainedConfig], batch_size: int, device: torch.device) -> None:
        super().__init__(layers=[])
        self.elms = [DynamicCache(config=config) for config in configs]
        self.active = torch.ones(len(configs), batch_size, dtype=torch.bool, device=device)
        self.rows: list[Tensor | slice] = [slice(None)] * len(configs)
        self.selected = False
        self.evidence = torch.zeros(len(configs), batch_size, dtype=torch.float64, device=device)
        self.last = torch.zeros_like(self.evidence)
        self.has_last = torch.zeros(batch_size, dtype=torch.bool, device=device)
        self.next_logp: list[Tensor | None] = [None] * len(configs)
        self.length = 0

    def has_rows(self, elm: int) -> bool:
        """Whether ``elm`` reads any row."""
        rows = self.rows[elm]
        return isinstance(rows, slice) or len(rows) > 0

    def keep(self, kept: Tensor) -> None:
        """Let only the ELMs in ``kept`` ``(E, B)`` go on reading; the caches of the others are freed."""
        for elm, rows in enumerate(self.rows):
            self._select(elm, kept[elm, rows].nonzero().squeeze(1))
        self._set_active(self.active & kept)
        self.selected = True

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Positions read so far, padding included."""
        return self.length

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Make row ``i`` continue what row ``beam_idx[i]`` was (beam search)."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows ``indices``, in that order; rows may repeat."""
        indices = indices.to(self.active.device)
        active = self.active[:, indices]
        for elm, rows in enumerate(self.rows):
            wanted = indices[active[elm]]
            self._select(elm, wanted if isinstance(rows, slice) else torch.searchsorted(rows, wanted))
        self.evidence, self.last, self.has_last = (
            self.evidence[:, indices],
            self.last[:, indices],
            self.has_last[indices],
        )
        self._set_active(active)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row ``repeats`` times."""
        rows = torch.arange(self.active.shape[1], device=self.active.device)
        self.batch_select_indices(rows.repeat_interleave(repeats))

    def crop(self, tokens_to_remove: int) -> NoReturn:
        """Not supported: evidence cannot be taken back.

        Raises:
            NotImplementedError: Always.
        """
        raise NotImplementedError("an ensemble cannot un-read tokens: use generate without an assistant model")

    @property
    def is_croppable(self) -> bool:
        """False: see :meth:`crop`."""
        return False

    def _set_active(self, active: Tensor) -> None:
        self.active = active
        rows = [mask.nonzero().squeeze(1) for mask in active]
        self.rows = [slice(None) if len(index) == active.shape[1] else index for index in rows]

    def _select(self, elm: int, local: Tensor) -> None:
        """Keep the entries ``local`` of the active rows of ``elm``."""
        if self.length and len(local):
            self.elms[elm].batch_select_indices(local)
        elif self.length:
            self.elms[elm] = DynamicCache()
        logp = self.next_logp[elm]
        self.next_logp[elm] = None if logp is None else logp[local]
