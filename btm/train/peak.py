"""The rate of matrix multiplication that this process can reach, the yardstick of achieved FLOP/s."""

import time

import torch

from btm.train.ranks import Ranks

_BURST_S = 0.1
_SIZES = {("cpu", torch.float32): 1024, ("cpu", torch.bfloat16): 2048}
_GPU_SIZE = 8192


def matmul_peak(dtype: torch.dtype, device: torch.device) -> float:
    """Measure FLOP/s of one square matmul with the threads that this process has; takes 0.1 to 0.3 s.

    Args:
        dtype: bfloat16 or float32.
        device: Where to multiply.

    Returns:
        FLOP/s of the fastest repetition.
    """
    size = _SIZES.get((device.type, dtype), _GPU_SIZE)
    # Random digits in both factors: constant data draws less power and flatters some devices.
    generator = torch.Generator(device).manual_seed(0)
    left, right = (torch.randn(size, size, device=device, generator=generator).to(dtype) for _ in range(2))
    result = torch.empty(size, size, dtype=dtype, device=device)
    torch.mm(left, right, out=result)
    fastest = float("inf")
    deadline = time.perf_counter() + _BURST_S
    while time.perf_counter() < deadline or fastest == float("inf"):
        start = _now(device)
        torch.mm(left, right, out=result)
        fastest = min(fastest, _now(device) - start)
    return 2.0 * size**3 / fastest


def matmul_peak_of(ranks: Ranks, dtype: torch.dtype) -> float:
    """Measure FLOP/s that all ranks together reach; every rank calls it.

    Args:
        ranks: The processes that run one model.
        dtype: bfloat16 or float32.

    Returns:
        Sum of :func:`matmul_peak` over the ranks.
    """
    peak = torch.tensor([matmul_peak(dtype, ranks.device)], dtype=torch.float64, device=ranks.device)
    return float(ranks.sum_(peak).item())


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
