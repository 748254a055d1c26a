"""Building native code: cached, atomic, safe from two processes at once, optional."""

import ctypes
import multiprocessing
import shutil
from pathlib import Path

import pytest
import torch

import moe_kernels
from moe_kernels.native import build_library, cache_dir, load_library

SOURCE = Path(moe_kernels.__file__).parent / "native" / "assignment.cpp"
COMPILER = shutil.which("g++") or shutil.which("clang++")
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")


def _build(queue):
    queue.put(str(build_library(SOURCE, compiler=COMPILER)))


@needs_compiler
def test_two_processes_build_one_library(tmp_path, monkeypatch):
    monkeypatch.setenv("MOE_KERNELS_CACHE_DIR", str(tmp_path / "a b"))
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    workers = [context.Process(target=_build, args=(queue,)) for _ in range(2)]
    for worker in workers:
        worker.start()
    paths = {queue.get(timeout=120) for _ in workers}
    for worker in workers:
        worker.join(60)
    assert [path.name for path in cache_dir().iterdir()] == [Path(paths.pop()).name]


@needs_compiler
def test_a_library_without_openmp_gives_the_same(tmp_path, monkeypatch):
    monkeypatch.setenv("MOE_KERNELS_CACHE_DIR", str(tmp_path))
    path = build_library(SOURCE.with_name("routing.cpp"), compiler=COMPILER, has_openmp=False)
    scores = torch.randn(5000, 48, generator=torch.Generator().manual_seed(0))
    expert = torch.empty(5000, 3, dtype=torch.int64)
    sizes = [ctypes.c_int64(size) for size in (5000, 48, 3)]
    pointers = [ctypes.c_void_p(tensor.data_ptr()) for tensor in (scores, expert)]
    assert ctypes.CDLL(str(path)).moe_top_k(pointers[0], *sizes, 3, pointers[1], None) == 0
    assert torch.equal(expert, scores.topk(3, dim=1).indices)


def test_without_native_code_the_torch_code_answers(monkeypatch):
    scores = torch.randn(200, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    native = moe_kernels.assign_balanced(scores)
    monkeypatch.setenv("MOE_KERNELS_NATIVE", "0")
    load_library.cache_clear()
    try:
        assert load_library("assignment") is None
        assert torch.equal(moe_kernels.assign_balanced(scores), native)
    finally:
        load_library.cache_clear()


def test_a_failing_compiler_warns_and_falls_back(tmp_path, monkeypatch):
    monkeypatch.setenv("MOE_KERNELS_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("CXX", "/bin/false")
    load_library.cache_clear()
    try:
        with pytest.warns(UserWarning, match="slower torch code"):
            assert load_library("assignment") is None
    finally:
        load_library.cache_clear()
    assert list(tmp_path.iterdir()) == []
