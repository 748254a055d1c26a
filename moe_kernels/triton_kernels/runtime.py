"""When Triton is used, and the one place that loads it.

Kernels run natively on CUDA tensors. With ``TRITON_INTERPRET=1`` in the environment before Triton is first imported
they run on CPU tensors through Triton's interpreter, slowly: that is how they are tested without a GPU.
"""

import contextlib
import functools
import importlib
import importlib.util
import os
from types import ModuleType
from typing import Any

import torch

from moe_kernels.errors import MoeError, check_choice

BACKENDS = ("auto", "torch", "triton")


@functools.cache
def has_triton() -> bool:
    """Whether Triton is installed; does not import it."""
    return importlib.util.find_spec("triton") is not None


def is_interpreted() -> bool:
    """Whether kernels run through Triton's interpreter."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on")


def use_triton(backend: str, tensor: torch.Tensor) -> bool:
    """Decide between Triton and the code that needs torch only.

    Args:
        backend: ``auto`` takes Triton for CUDA tensors where it is installed; ``torch`` never does; ``triton`` always.
        tensor: One of the tensors to be worked on.

    Returns:
        Whether to launch Triton kernels.

    Raises:
        MoeError: If the backend is unknown, or Triton is asked for where it cannot run.
    """
    check_choice("backend", backend, BACKENDS)
    if backend == "auto":
        return tensor.is_cuda and has_triton()
    if backend == "torch":
        return False
    if not has_triton():
        raise MoeError("backend", got="triton", allowed="torch", remedy="pip install triton, or leave it to auto")
    if not tensor.is_cuda and not is_interpreted():
        raise MoeError(
            "device for backend triton",
            got=tensor.device,
            allowed="a CUDA device",
            remedy="move the tensors, or set TRITON_INTERPRET=1 before Triton is imported to test without a GPU",
        )
    return True


def kernels(name: str) -> ModuleType:
    """Load a module of device code.

    Args:
        name: ``permute``, ``grouped``, ``routing`` or ``auction``.

    Returns:
        ``moe_kernels.triton_kernels.<name>_kernels``.
    """
    return importlib.import_module(f"moe_kernels.triton_kernels.{name}_kernels")


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **meta: Any) -> None:
    """Launch a kernel on the device of its first tensor; an empty grid launches nothing.

    Args:
        kernel: A function under ``triton.jit``.
        grid: Programs along each axis.
        arguments: Tensors and numbers in the order of the kernel's parameters; ``None`` where it does not look.
        meta: Its ``constexpr`` parameters, ``num_warps`` and ``num_stages``.
    """
    if 0 in grid:
        return
    device = next(value.device for value in arguments if isinstance(value, torch.Tensor))
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        kernel[grid](*arguments, **meta)


def next_power_of_2(number: int) -> int:
    """The least power of two that is not below a positive number."""
    return 1 << max(0, number - 1).bit_length()
