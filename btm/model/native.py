"""One-pass C++ versions of the memory-bound steps, compiled once per machine; plain torch where that is not possible.

``native.cpp`` needs nothing but a C++ compiler: it is built in about a second on first use into the user's cache
directory and called through ctypes. It shares torch's OpenMP threads. Without a compiler, without OpenMP, or with
``BTM_NATIVE=0``, :func:`kernels` returns None and the callers take their torch path, which gives the same values to
rounding.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from btm.files import exclusive_lock

_SOURCE = Path(__file__).with_name("native.cpp")
_FLAGS = (
    "-O3",
    "-march=native",
    "-std=c++17",
    "-fPIC",
    "-fopenmp",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fno-signed-zeros",
    "-fassociative-math",
    "-freciprocal-math",
)
_COMPILE_TIMEOUT_S = 120.0
_SUFFIXES = {"p": ctypes.c_void_p, "i": ctypes.c_int, "l": ctypes.c_int64, "f": ctypes.c_float}
_SIGNATURES = {
    "btm_rms_forward": "ippppllf",
    "btm_rms_backward": "ippppp" + "plll",
    "btm_swiglu_forward": "ipppl",
    "btm_swiglu_backward": "ipppppl",
    "btm_rotate": "ippppllllli",
    "btm_softmax_forward": "ipllllpl",
    "btm_softmax_backward": "ippllll",
    "btm_cross_entropy": "ipppll" + "i",
}


class Kernels:
    """The compiled functions; tensors become pointers, Python numbers C numbers."""

    def __init__(self, library: ctypes.CDLL) -> None:
        for name, signature in _SIGNATURES.items():
            function = getattr(library, name)
            function.argtypes = [_SUFFIXES[letter] for letter in signature]
            function.restype = None
        self._library = library

    def call(self, name: str, dtype: torch.dtype, *arguments: torch.Tensor | float | None) -> None:
        """Run ``btm_<name>`` on contiguous CPU tensors of type ``dtype`` (bf16 or fp32)."""
        values = [item.data_ptr() if isinstance(item, torch.Tensor) else item for item in arguments]
        getattr(self._library, f"btm_{name}")(int(dtype == torch.bfloat16), *values)


@functools.cache
def kernels() -> Kernels | None:
    """The compiled functions, built if need be; None where this machine cannot build or load them."""
    compiler = os.environ.get("CXX") or shutil.which("g++")
    if os.environ.get("BTM_NATIVE") == "0" or platform.system() != "Linux" or not compiler:
        return None
    try:
        return Kernels(ctypes.CDLL(str(_built_library(compiler)), mode=os.RTLD_NOW))
    except (OSError, AttributeError, subprocess.SubprocessError):
        return None


def usable(tensor: torch.Tensor) -> Kernels | None:
    """The compiled functions when they can work on ``tensor``: on the CPU, bf16 or fp32; else None."""
    if tensor.device.type != "cpu" or tensor.dtype not in (torch.bfloat16, torch.float32):
        return None
    return kernels()


def _built_library(compiler: str) -> Path:
    directory = _cache_directory()
    path = directory / f"kernels-{_build_key(compiler)}.so"
    if not path.exists():
        with exclusive_lock(directory / "build.lock"):
            if not path.exists():
                _compile(compiler, path)
    return path


def _compile(compiler: str, path: Path) -> None:
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        compiled, linked = Path(scratch, "native.o"), Path(scratch, "native.so")
        _run([compiler, *_FLAGS, "-c", str(_SOURCE), "-o", str(compiled)])
        # Linked without -fopenmp: the OpenMP functions resolve to torch's own library, so there is one thread pool.
        _run([compiler, "-shared", str(compiled), "-o", str(linked)])
        os.replace(linked, path)


def _run(command: Sequence[str]) -> None:
    subprocess.run(
        command, check=True, stdin=subprocess.DEVNULL, capture_output=True, timeout=_COMPILE_TIMEOUT_S, text=True
    )


def _build_key(compiler: str) -> str:
    digest = hashlib.sha256(_SOURCE.read_bytes())
    digest.update("\0".join((compiler, *_FLAGS, platform.machine(), _cpu_flags())).encode())
    return digest.hexdigest()[:16]


def _cpu_flags() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith(("flags", "Features")):
            return line
    return ""


def _cache_directory() -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    directory = Path(root) / "btm"
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    status = directory.stat()
    if status.st_uid != os.getuid() or status.st_mode & 0o022:
        raise PermissionError(f"{directory} can be written by others; code is not loaded from there")
    return directory
