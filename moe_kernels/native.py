"""Native code, built on first use and kept in the user's cache directory.

The sources lie in ``moe_kernels/native``. A build goes to a temporary file that then takes the final name in one step,
so two processes that build at once do no harm. Where no compiler is found, callers get ``None`` and use torch.

Environment: ``MOE_KERNELS_NATIVE=0`` turns native code off, ``MOE_KERNELS_CACHE_DIR`` moves the cache, ``CXX`` names
the compiler.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import warnings
from pathlib import Path

_FLAGS = ("-O3", "-std=c++17", "-fPIC", "-pthread", "-w")
_BUILD_TIMEOUT_S = 300


def cache_dir() -> Path:
    """Directory of built libraries: ``MOE_KERNELS_CACHE_DIR``, or ``moe_kernels`` under the user's cache directory."""
    chosen = os.environ.get("MOE_KERNELS_CACHE_DIR")
    if chosen:
        return Path(chosen)
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "moe_kernels"


def is_native_on() -> bool:
    """Whether native code may be used: true unless ``MOE_KERNELS_NATIVE`` is ``0``."""
    return os.environ.get("MOE_KERNELS_NATIVE", "1") != "0"


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(errors="replace").splitlines():
            if line.startswith(("flags", "Features")):
                return line
    return platform.machine() + platform.processor()


def _compile(compiler: str, source: Path, target: Path, has_openmp: bool) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".build-") as scratch:
        compiled, linked = Path(scratch, "library.o"), Path(scratch, "library.so")
        flags = [*_FLAGS, *(["-fopenmp"] if has_openmp else [])]
        for extra in (["-march=native"], []):
            command = [compiler, *flags, *extra, "-c", str(source), "-o", str(compiled)]
            done = subprocess.run(command, capture_output=True, text=True, timeout=_BUILD_TIMEOUT_S, check=False)
            if done.returncode == 0:
                break
        else:
            raise OSError(f"{compiler} could not build {source.name}: {done.stderr[-500:]}")
        # Linked without -fopenmp: the OpenMP functions are then torch's own, so there is one pool of threads.
        command = [compiler, "-shared", "-pthread", str(compiled), "-o", str(linked)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=_BUILD_TIMEOUT_S, check=False)
        if done.returncode:
            raise OSError(f"{compiler} could not link {source.name}: {done.stderr[-500:]}")
        linked.replace(target)


def build_library(source: Path, *, compiler: str, has_openmp: bool = True) -> Path:
    """Build a shared library unless the cache holds one of the same sources, flags, compiler and processor.

    Args:
        source: The C++ file; headers beside it count as sources too.
        compiler: Path of the compiler.
        has_openmp: Whether it shares torch's OpenMP threads; otherwise it starts threads of its own.

    Returns:
        Path of the library.

    Raises:
        OSError: If the compiler fails or the cache cannot be written.
    """
    key = hashlib.sha256("\0".join([compiler, _processor(), str(has_openmp), *_FLAGS]).encode())
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, timeout=60, check=False).stdout
    key.update(version.encode())
    for path in sorted([*source.parent.glob("*.hpp"), source]):
        key.update(path.read_bytes())
    target = cache_dir() / f"{source.stem}-{key.hexdigest()[:20]}.so"
    if not target.exists():
        _compile(compiler, source, target, has_openmp)
    return target


@functools.cache
def load_library(name: str) -> ctypes.CDLL | None:
    """Load ``native/<name>.cpp``, building it where needed.

    Args:
        name: Stem of the source file.

    Returns:
        The library, or ``None`` when native code is off or cannot be built; the reason is then given as a warning.
    """
    if not is_native_on():
        return None
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++") or shutil.which("c++")
    if not compiler:
        warnings.warn("moe_kernels found no C++ compiler and uses its slower torch code", stacklevel=2)
        return None
    source, problem = Path(__file__).parent / "native" / f"{name}.cpp", ""
    for has_openmp in (True, False):  # without, where the compiler has none or torch's is another kind
        try:
            return ctypes.CDLL(str(build_library(source, compiler=compiler, has_openmp=has_openmp)))
        except (OSError, subprocess.SubprocessError) as error:
            problem = str(error)
    warnings.warn(f"moe_kernels uses its slower torch code: {problem}", stacklevel=2)
    return None
