import ctypes
import os
import shutil
import subprocess
import sys

import pytest
import torch

from btm.model import native

needs_compiler = pytest.mark.skipif(sys.platform != "linux" or not shutil.which("g++"), reason="needs g++ on Linux")


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """An empty cache directory and a forgotten library."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("BTM_NATIVE", raising=False)
    native.kernels.cache_clear()
    yield tmp_path / "btm"
    native.kernels.cache_clear()


@needs_compiler
def test_the_functions_are_built_once(fresh):
    assert native.kernels() is not None
    (library,) = fresh.glob("*.so")
    built = library.stat().st_mtime_ns
    native.kernels.cache_clear()
    assert native.kernels() is not None
    assert library.stat().st_mtime_ns == built


@needs_compiler
def test_openmp_is_torchs_own(fresh):
    """A second thread pool would fight with torch's for the cores."""
    # In a process of its own: other tests load libraries that bring another.
    program = "from btm.model import native; assert native.kernels(); print(open('/proc/self/maps').read())"
    maps = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    lines = maps.splitlines()
    pools = {line.split()[-1] for line in lines if "libgomp" in line or "libiomp" in line or "libomp" in line}
    assert len(pools) == 1


@needs_compiler
def test_many_processes_may_build_at_once(fresh):
    program = "from btm.model import native; assert native.kernels() is not None"
    builders = [subprocess.Popen([sys.executable, "-c", program]) for _ in range(2)]
    assert [builder.wait(timeout=100) for builder in builders] == [0, 0]
    assert len(list(fresh.glob("*.so"))) == 1


@pytest.mark.parametrize("obstacle", ["switched_off", "no_compiler", "broken_compiler", "unloadable"])
def test_torch_takes_over(fresh, monkeypatch, obstacle):
    if obstacle == "switched_off":
        monkeypatch.setenv("BTM_NATIVE", "0")
    elif obstacle == "no_compiler":
        monkeypatch.delenv("CXX", raising=False)
        monkeypatch.setattr(shutil, "which", lambda name: None)
    elif obstacle == "broken_compiler":
        monkeypatch.setenv("CXX", "/bin/false")
    else:
        monkeypatch.setattr(ctypes, "CDLL", lambda *args, **kwargs: (_ for _ in ()).throw(OSError("cannot load")))
    assert native.kernels() is None
    assert native.usable(torch.ones(2)) is None


@needs_compiler
def test_code_that_others_could_have_written_is_not_loaded(fresh):
    fresh.mkdir()
    os.chmod(fresh, 0o777)
    assert native.kernels() is None


@needs_compiler
def test_only_bf16_and_fp32_on_the_cpu_are_native(fresh):
    assert native.usable(torch.ones(2)) is not None
    assert native.usable(torch.ones(2, dtype=torch.bfloat16)) is not None
    assert native.usable(torch.ones(2, dtype=torch.float64)) is None
    assert native.usable(torch.ones(2, device="meta")) is None
