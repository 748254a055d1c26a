"""Balanced assignment: every expert gets the same number of tokens and the total score is the largest possible.

The problem is a transportation problem with one price per expert as its dual. On the CPU prices are found by Newton
steps on the dual, first on samples of the tokens; whatever still overflows moves along shortest augmenting paths
between experts. The native code in ``native/assignment.cpp`` and the torch code in ``assignment_torch.py`` do the
same. On CUDA devices an auction with epsilon scaling finds them, see ``epsilon_auction.py``.

Shapes: T tokens, E experts.
"""

import ctypes
from dataclasses import dataclass

import torch

from moe_kernels.assignment_torch import solve_exact
from moe_kernels.auction import assign_auction
from moe_kernels.epsilon_auction import run_auction
from moe_kernels.errors import MoeError, check_choice
from moe_kernels.native import load_library
from moe_kernels.triton_kernels.auction import RoundsInTriton
from moe_kernels.triton_kernels.runtime import use_triton

METHODS = ("exact", "auction")
_ROWS_PER_PASS = 1024


@dataclass(frozen=True, kw_only=True)
class Assignment:
    """An assignment and what finding it took."""

    expert_T: torch.Tensor
    """Expert id per token ``(T,)``, int64, on the device of the scores."""
    prices_E: torch.Tensor
    """Optimal prices ``(E,)``, float64 on the CPU: each token's expert has the highest score minus price."""
    num_replaced: int
    """Scores that were not finite and were replaced."""
    num_sweeps: int
    """Passes over all scores; on CUDA devices rounds of the auction."""
    num_overflow: int
    """Tokens above capacity after these passes."""
    num_paths: int
    """Augmenting paths that repaired them."""
    gap: float = 0.0
    """The total is at most this far below the best, beside rounding; 0 for the exact methods."""


def check_scores(scores_TE: torch.Tensor) -> None:
    """Refuse what is not a floating-point matrix with at least one expert.

    Args:
        scores_TE: Candidate scores ``(T, E)``.

    Raises:
        MoeError: If the shape or dtype is wrong.
    """
    if scores_TE.dim() != 2 or scores_TE.shape[1] < 1:
        raise MoeError(
            "shape of scores",
            got=tuple(scores_TE.shape),
            allowed="(tokens, experts) with at least one expert",
            remedy="flatten leading axes to one axis of tokens",
        )
    if not scores_TE.is_floating_point():
        raise MoeError(
            "dtype of scores", got=scores_TE.dtype, allowed="a floating-point dtype", remedy="convert with .float()"
        )


def replace_nonfinite(scores_TE: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Give every score a finite value: ``+inf`` becomes the largest finite score, NaN and ``-inf`` the smallest.

    Args:
        scores_TE: Scores ``(T, E)``.

    Returns:
        The scores, and how many were replaced. Without any finite score all become 0.
    """
    count, low, high = 0, torch.inf, -torch.inf
    for part in scores_TE.split(_ROWS_PER_PASS):  # parts that stay in the cache
        bad = ~torch.isfinite(part)
        count += int(bad.sum())
        low = min(low, float(part.masked_fill(bad, torch.inf).min()))
        high = max(high, float(part.masked_fill(bad, -torch.inf).max()))
    if count == 0:
        return scores_TE, 0
    if low > high:
        low = high = 0.0
    return torch.nan_to_num(scores_TE, nan=low, posinf=high, neginf=low), count


def _pointer(tensor: torch.Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


def _replace_native(library: ctypes.CDLL, scores_TE: torch.Tensor) -> tuple[torch.Tensor, int]:
    function = library.moe_replace_float if scores_TE.dtype == torch.float32 else library.moe_replace_double
    function.restype = ctypes.c_int64
    clean_TE = torch.empty_like(scores_TE)
    pointers = _pointer(scores_TE), _pointer(clean_TE)
    count = function(pointers[0], ctypes.c_int64(scores_TE.numel()), torch.get_num_threads(), pointers[1])
    if count < 0:
        raise MemoryError(f"no memory to check {scores_TE.numel()} scores")
    return clean_TE, count


def _solve_native(library: ctypes.CDLL, scores_TE: torch.Tensor, warm_E: torch.Tensor | None) -> Assignment:
    num_tokens, num_experts = scores_TE.shape
    if scores_TE.dtype not in (torch.float32, torch.float64):
        scores_TE = scores_TE.float()
    scores_TE = scores_TE.contiguous()
    prices_E = torch.zeros(num_experts, dtype=torch.float64) if warm_E is None else warm_E.clone()
    expert_T = torch.empty(num_tokens, dtype=torch.int64)
    report = (ctypes.c_int64 * 3)()
    function = library.moe_assign_float if scores_TE.dtype == torch.float32 else library.moe_assign_double
    outcome = function(
        _pointer(scores_TE),
        ctypes.c_int64(num_tokens),
        ctypes.c_int64(num_experts),
        torch.get_num_threads(),
        int(warm_E is not None),
        _pointer(prices_E),
        _pointer(expert_T),
        report,
    )
    if outcome == 1:
        raise MemoryError(f"no memory to assign {num_tokens} tokens to {num_experts} experts")
    if outcome == 2:
        clean_TE, count = _replace_native(library, scores_TE)
        solved = _solve_native(library, clean_TE, warm_E)
        return Assignment(**{**vars(solved), "num_replaced": count})
    if outcome == 3:
        return _solve_scaled(library, scores_TE, warm_E)
    return Assignment(
        expert_T=expert_T,
        prices_E=prices_E,
        num_replaced=0,
        num_sweeps=report[0],
        num_overflow=report[1],
        num_paths=report[2],
    )


def _solve_scaled(library: ctypes.CDLL, scores_TE: torch.Tensor, warm_E: torch.Tensor | None) -> Assignment:
    scale = 2.0**-900 if scores_TE.dtype == torch.float64 else 1.0
    solved = _solve_native(library, scores_TE.double() * scale, None if warm_E is None else warm_E * scale)
    return Assignment(**{**vars(solved), "prices_E": solved.prices_E / scale})


def _checked_prices(warm_prices_E: torch.Tensor | None, num_experts: int) -> torch.Tensor | None:
    if warm_prices_E is None:
        return None
    prices_E = warm_prices_E.detach().to("cpu", torch.float64).contiguous()
    if prices_E.shape != (num_experts,):
        raise MoeError(
            "shape of warm_prices_E",
            got=tuple(prices_E.shape),
            allowed=f"({num_experts},)",
            remedy="hand over the prices_E of an assignment with as many experts",
        )
    return prices_E if bool(torch.isfinite(prices_E).all()) else None


def _solve_on_device(scores_TE: torch.Tensor, warm_E: torch.Tensor | None) -> Assignment | None:
    scores_TE = scores_TE.detach()
    bad_TE = ~torch.isfinite(scores_TE)
    low, high = scores_TE.masked_fill(bad_TE, torch.inf).amin(), scores_TE.masked_fill(bad_TE, -torch.inf).amax()
    low, high = torch.where(low > high, 0.0, low), torch.where(low > high, 0.0, high)
    clean_TE = torch.where(bad_TE, torch.where(scores_TE == torch.inf, high, low), scores_TE).contiguous()
    found = run_auction(clean_TE, rounds=RoundsInTriton(clean_TE), warm_prices_E=warm_E)
    if not found.is_finished:
        return None
    return Assignment(
        expert_T=found.expert_T,
        prices_E=found.price_E.cpu(),
        num_replaced=int(bad_TE.sum()),
        num_sweeps=found.num_rounds,
        num_overflow=0,
        num_paths=0,
        gap=float(found.gap),
    )


def solve_assignment(
    scores_TE: torch.Tensor, *, warm_prices_E: torch.Tensor | None = None, backend: str = "auto"
) -> Assignment:
    """Assign tokens to experts with the largest total score, each expert getting its equal share of tokens.

    The share is ``floor(T/E)`` or ``ceil(T/E)``. On the CPU exact up to the rounding of float64: the total is that of
    the best of all balanced assignments, found with at most ``T`` augmenting paths, so it always ends. On CUDA devices
    the total is at most ``(2 * T + E) * 6e-8`` of the range of the scores below the best, and ``gap`` says how far; an
    auction that has not ended after its bounded rounds is dropped for the exact method on the CPU. Deterministic: the
    same scores give the same answer for any number of threads, and the same on any device of one kind.

    Args:
        scores_TE: Affinities ``(T, E)``, any float dtype and device. NaN and ``-inf`` count as the smallest finite
            score, ``+inf`` as the largest.
        warm_prices_E: ``prices_E`` of a similar problem, for instance of the last step; saves most of the passes. The
            total score does not depend on them.
        backend: ``torch`` for the exact method on the CPU, ``triton`` for the auction on the device of the scores, or
            ``auto``: Triton on CUDA devices.

    Returns:
        The assignment with its prices.

    Raises:
        MoeError: If the scores are not a floating-point matrix, the prices do not fit or the backend cannot be had.
        MemoryError: If the scratch memory of about ``40 * E * E`` bytes cannot be had.
    """
    check_scores(scores_TE)
    num_tokens, num_experts = scores_TE.shape
    warm_E = _checked_prices(warm_prices_E, num_experts)
    device = scores_TE.device
    if use_triton(backend, scores_TE) and num_tokens and num_experts > 1:
        on_device = _solve_on_device(scores_TE, warm_E)
        if on_device is not None:
            return on_device
    scores_TE = scores_TE.detach().to("cpu")
    if num_tokens == 0 or num_experts == 1:
        return Assignment(
            expert_T=torch.zeros(num_tokens, dtype=torch.int64, device=device),
            prices_E=torch.zeros(num_experts, dtype=torch.float64),
            num_replaced=int((~torch.isfinite(scores_TE)).sum()),
            num_sweeps=0,
            num_overflow=0,
            num_paths=0,
        )
    library = load_library("assignment")
    if library is not None:
        solved = _solve_native(library, scores_TE, warm_E)
    else:
        clean_TE, count = replace_nonfinite(scores_TE)
        expert_T, prices_E, (sweeps, overflow, paths) = solve_exact(clean_TE.double(), warm_E)
        solved = Assignment(
            expert_T=expert_T,
            prices_E=prices_E,
            num_replaced=count,
            num_sweeps=sweeps,
            num_overflow=overflow,
            num_paths=paths,
        )
    return Assignment(**{**vars(solved), "expert_T": solved.expert_T.to(device)}) if device.type != "cpu" else solved


def assign_balanced(scores_TE: torch.Tensor, *, method: str = "exact", backend: str = "auto") -> torch.Tensor:
    """Give every expert the same number of tokens, with the largest total score.

    The assignment of BASE layers (Lewis et al. 2021, https://arxiv.org/abs/2103.16716, section 3.2). Each expert gets
    ``floor(T/E)`` or ``ceil(T/E)`` tokens; which ones get the larger share is part of what is optimised.

    Args:
        scores_TE: Affinities ``(T, E)``, any float dtype; see `solve_assignment` for scores that are not finite.
        method: ``exact``, or ``auction`` for the published approximation, which needs ``T`` to be a multiple of ``E``
            and ``E > 1``; its total is typically within 0.3 % of the best.
        backend: Of the exact method, see `solve_assignment`, which says what it guarantees on CUDA devices.

    Returns:
        Expert id per token ``(T,)``, int64.

    Raises:
        MoeError: If the scores are not a floating-point matrix, the method or backend is unknown, or cannot be had.
    """
    check_choice("method of assign_balanced", method, METHODS)
    check_scores(scores_TE)
    if method == "auction":
        return assign_auction(scores_TE)
    return solve_assignment(scores_TE, backend=backend).expert_T
