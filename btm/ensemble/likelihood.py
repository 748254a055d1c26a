"""Log-probability of every token of some documents under one model: all that perplexity needs of an ELM."""

from collections.abc import Sequence

import numpy as np
import torch
from transformers import PreTrainedModel

from btm.corpus.windows import Windows
from btm.model.expert_pass import ExpertPass
from btm.model.loss import IGNORED, token_losses
from btm.model.patches import prepare_for_training
from btm.model.sparse_lm import sparsity_of


class TokenDocuments:
    """Documents in memory with what :func:`btm.corpus.windows.document_windows` reads of a token shard.

    Attributes:
        tokens: Ids of all documents one after the other, int64 ``(tokens,)``.
        lengths: Tokens of each document, int64 ``(documents,)``.
        bytes: 0 for each document: nobody counted them.
    """

    def __init__(self, documents: Sequence[Sequence[int]]) -> None:
        self.lengths = np.array([len(document) for document in documents], dtype=np.int64)
        self.tokens = np.fromiter((token for document in documents for token in document), dtype=np.int64)
        self.bytes = np.zeros(len(documents), dtype=np.int64)


def token_log_likelihoods(
    model: PreTrainedModel, windows: Windows, *, batch_sequences: int, pass_tokens: int | None = None
) -> np.ndarray:
    """Score every target of ``windows`` under ``model``.

    Windows of similar length share a batch, which is cut to its longest window; with ``pass_tokens`` a batch is a
    random sample of that size. The batches depend on the windows and on these numbers alone, so that the same request
    gives the same bits. The model runs on the fast paths of :mod:`btm.model.patches` for the time of this call only:
    later generation with a KV cache is untouched.

    Args:
        model: A causal LM, on any one device.
        windows: Windows of documents; see :func:`btm.corpus.windows.document_windows`.
        batch_sequences: Windows per forward pass.
        pass_tokens: Tokens per forward pass instead, for experts that choose among all of a pass: they find the mixture
            that they know from training in passes of the same size alone.

    Returns:
        Log-probabilities in nats, float32, all documents' tokens one after the other: ``(tokens,)``.
    """
    prepared = prepare_for_training(model, model.device)
    try:
        return _score(model, windows, _passes(windows.lengths, batch_sequences, pass_tokens))
    finally:
        prepared.undo()


def _score(model: PreTrainedModel, windows: Windows, passes: Sequence[np.ndarray]) -> np.ndarray:
    logp = np.zeros(windows.targets.shape, dtype=np.float32)
    is_sparse = sparsity_of(model) is not None
    for chosen in passes:
        width = int(windows.lengths[chosen].max())
        inputs = torch.from_numpy(np.ascontiguousarray(windows.inputs[chosen, :width])).to(model.device)
        targets = torch.from_numpy(np.ascontiguousarray(windows.targets[chosen, :width])).to(model.device)
        # Padding must not take the places of real tokens where experts choose over the whole pass.
        experts = ExpertPass(is_real=targets != IGNORED) if is_sparse else None
        logp[chosen, :width] = -token_losses(model, inputs, targets, experts=experts).cpu().numpy()
    return logp[windows.targets != IGNORED]


def _passes(lengths: np.ndarray, batch_sequences: int, pass_tokens: int | None) -> list[np.ndarray]:
    """Numbers of the windows of each forward pass; every window once."""
    if pass_tokens is None:
        order = np.argsort(-lengths, kind="stable")
        return [order[start : start + batch_sequences] for start in range(0, len(order), batch_sequences)]
    order = np.random.default_rng(len(lengths)).permutation(len(lengths))
    total = int(lengths.sum())
    count = max(1, round(total / pass_tokens))
    place = np.minimum((np.cumsum(lengths[order]) - 1) * count // max(1, total), count - 1)
    return [part for number in range(count) if len(part := order[place == number])]
