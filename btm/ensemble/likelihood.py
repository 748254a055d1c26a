"""Log-probability of every token of some documents under one model: all that perplexity needs of an ELM."""

import numpy as np
import torch
from transformers import PreTrainedModel

from btm.corpus.windows import Windows
from btm.model.loss import token_losses

_IGNORED = -100


def token_log_likelihoods(model: PreTrainedModel, windows: Windows, *, batch_sequences: int) -> np.ndarray:
    """Score every target of ``windows`` under ``model``.

    Windows of similar length share a batch, which is cut to its longest window. The batches depend on the windows and
    on ``batch_sequences`` alone, so that the same request gives the same bits.

    Args:
        model: A causal LM, on any device.
        windows: Windows of documents; see :func:`btm.corpus.windows.document_windows`.
        batch_sequences: Windows per forward pass.

    Returns:
        Log-probabilities in nats, float32, all documents' tokens one after the other: ``(tokens,)``.
    """
    counted = np.asarray(windows.targets) != _IGNORED
    lengths = counted.sum(1)
    logp = np.zeros(counted.shape, dtype=np.float32)
    order = np.argsort(-lengths, kind="stable")
    for start in range(0, len(order), batch_sequences):
        chosen = order[start : start + batch_sequences]
        width = int(lengths[chosen].max(initial=0))
        inputs = torch.from_numpy(np.ascontiguousarray(windows.inputs[chosen, :width])).to(model.device)
        targets = torch.from_numpy(np.ascontiguousarray(windows.targets[chosen, :width])).to(model.device)
        logp[chosen, :width] = -token_losses(model, inputs, targets).cpu().numpy()
    return logp[counted]
