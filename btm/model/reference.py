"""The fast paths once more, slow and obvious: what ``elementwise``, ``attention`` and ``linear_cross_entropy`` equal.

Plain torch with torch's own gradients, for tests and for readers. Arguments and results are those of the functions of
the same names.
"""

import torch
from torch.nn import functional


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """See :func:`btm.model.elementwise.rms_norm`."""
    return x / torch.sqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """See :func:`btm.model.elementwise.swiglu`."""
    return gate * torch.sigmoid(gate) * up


def rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """See :func:`btm.model.elementwise.rotary`."""
    low, high = x.transpose(1, 2).chunk(2, dim=-1)
    turned = torch.cat((-high, low), dim=-1)
    return torch.cat((low, high), dim=-1) * cos[:, None] + turned * sin[:, None]


def causal_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    scaling: float,
    segments: torch.Tensor | None = None,
) -> torch.Tensor:
    """See :func:`btm.model.attention.causal_attention`."""
    groups = query.shape[1] // key.shape[1]
    key, value = (item.repeat_interleave(groups, dim=1) for item in (key, value))
    length = query.shape[2]
    seen = torch.ones(length, length, dtype=torch.bool, device=query.device).tril()[None, None]
    if segments is not None:
        seen = seen & (segments[:, None, :, None] == segments[:, None, None, :])
    scores = (query @ key.transpose(2, 3) * scaling).masked_fill(~seen, float("-inf"))
    return (scores.softmax(-1) @ value).transpose(1, 2)


def linear_cross_entropy_rows(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """See :func:`btm.model.linear_cross_entropy.linear_cross_entropy_rows`."""
    return functional.cross_entropy(hidden @ weight.t(), targets, reduction="none")
