"""Does a token's output depend on later tokens? Tried, not argued: later tokens are changed and outputs compared.

Shapes: B sequences, S positions, D model width.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from moe_kernels.errors import MoeError, check_range
from moe_kernels.types import LayerOutput


@dataclass(frozen=True, kw_only=True)
class CausalityReport:
    """What `check_causality` found."""

    is_causal: bool
    """Whether no output up to a position changed by more than the tolerance when later tokens changed."""
    largest_change: float
    """Largest absolute change of an output that should have stayed."""
    position: int | None
    """Last unchanged position of the trial with the largest change above the tolerance; ``None`` if causal."""


def _output(function: Callable[[torch.Tensor], object], inputs: torch.Tensor) -> torch.Tensor:
    result = function(inputs)
    if isinstance(result, LayerOutput):
        result = result.hidden
    result = getattr(result, "logits", result)
    if not isinstance(result, torch.Tensor) or result.shape[:2] != inputs.shape[:2]:
        got = tuple(result.shape) if isinstance(result, torch.Tensor) else type(result).__name__
        allowed = f"a tensor, LayerOutput or object with logits of {tuple(inputs.shape[:2])} leading axes"
        raise MoeError("result of the function", got=got, allowed=allowed, remedy="wrap it in a lambda")
    return result.detach()


def check_causality(
    function: Callable[[torch.Tensor], object],
    inputs: torch.Tensor,
    *,
    num_trials: int = 8,
    tolerance: float = 1e-5,
    num_ids: int | None = None,
    seed: int = 0,
) -> CausalityReport:
    """Change all tokens after a position, in all sequences, and compare the outputs up to it.

    Run it with the function in the mode of interest; stochastic parts must be off. All sequences are cut at the same
    position, so what leaks from one sequence's future into another sequence is found too.

    Args:
        function: A layer or model: maps ``inputs`` to a tensor with the same two leading axes, a `LayerOutput`, or an
            object with ``logits``.
        inputs: States ``(B, S, D)`` or token ids ``(B, S)``, ``S > 1``.
        num_trials: Random positions and changes to try, at least 1.
        tolerance: Largest change that counts as rounding.
        num_ids: For token ids: new ids are drawn below this.
        seed: Seed of the changes.

    Returns:
        The report.

    Raises:
        MoeError: If the inputs are too short, ``num_ids`` is missing for ids, or the result has another shape.
    """
    check_range("num_trials", num_trials, low=1)
    if inputs.dim() < 2 or inputs.shape[1] < 2 or inputs.shape[0] < 1:
        got = tuple(inputs.shape)
        raise MoeError("shape of inputs", got=got, allowed="(B, S, ...) with S > 1", remedy="give longer sequences")
    if not inputs.is_floating_point() and num_ids is None:
        raise MoeError("num_ids", got=None, allowed="the vocabulary size", remedy="needed where inputs are token ids")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        plain = _output(function, inputs)
        worst, where = 0.0, None
        for _ in range(num_trials):
            last = int(torch.randint(inputs.shape[1] - 1, (1,), generator=generator))
            changed = inputs.clone()
            changed[:, last + 1 :] = _fresh(changed[:, last + 1 :], num_ids, generator)
            difference = _output(function, changed)[:, : last + 1] - plain[:, : last + 1]
            change = float(difference.abs().nan_to_num(nan=torch.inf).max())
            if change > worst:
                worst, where = change, last
    is_causal = worst <= tolerance
    return CausalityReport(is_causal=is_causal, largest_change=worst, position=None if is_causal else where)


def _fresh(old: torch.Tensor, num_ids: int | None, generator: torch.Generator) -> torch.Tensor:
    if old.is_floating_point():
        noise = torch.randn(old.shape, generator=generator).to(old)
        return noise * 3 * old.float().std(correction=0).clamp(min=1e-3).to(old.dtype)
    assert num_ids is not None
    return torch.randint(num_ids, old.shape, generator=generator).to(old)
