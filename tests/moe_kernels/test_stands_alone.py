"""`pip install ./moe_kernels` gives a package that needs torch and nothing else."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import moe_kernels

PACKAGE = Path(moe_kernels.__file__).parent

RUNS_A_LAYER = """
import importlib.metadata, re, sys
from importlib.abc import MetaPathFinder

def needed(name, found):
    key = re.sub("[-_.]+", "-", name).lower()
    if key not in found:
        found.add(key)
        for line in importlib.metadata.requires(name) or []:
            if "extra ==" not in line:
                other = re.match("[A-Za-z0-9._-]+", line).group()
                try:
                    needed(other, found)
                except importlib.metadata.PackageNotFoundError:
                    pass  # belongs to another platform
    return found

allowed = needed("torch", {"setuptools", "pip"}) - {"triton"}
owners = importlib.metadata.packages_distributions()

class OnlyTorch(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        top = name.partition(".")[0]
        names = {re.sub("[-_.]+", "-", owner).lower() for owner in owners.get(top, [])}
        if top in {"btm", "launch"} or names and top != "moe_kernels" and not names & allowed:
            raise ModuleNotFoundError(f"{name} is not part of torch")

sys.meta_path.insert(0, OnlyTorch())
import torch
import moe_kernels
assert moe_kernels.__file__.startswith(sys.argv[1]), moe_kernels.__file__
expert_T = moe_kernels.assign_balanced(torch.randn(20, 4))
layer = moe_kernels.TopKConfig(width=8, hidden_width=16, num_experts=4, experts_per_token=2).build()
layer(torch.randn(10, 8)).hidden.sum().backward()
print(torch.bincount(expert_T).tolist())
"""


def files_in(folder: Path) -> set[str]:
    """Sources below a package's folder, and what its README and native code are made of."""
    kinds = {".py", ".cpp", ".hpp", ".md", ".typed"}
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.suffix in kinds}
    return {path for path in found if not path.startswith("build/")}


@pytest.mark.slow
def test_an_installation_of_its_own_works_with_torch_only(tmp_path: Path):
    """The build fetches setuptools, hence slow; what is installed beside torch cannot be imported."""
    source, target = tmp_path / "source" / "moe_kernels", tmp_path / "installed"
    shutil.copytree(PACKAGE, source, ignore=shutil.ignore_patterns("__pycache__", "build", "*.egg-info"))
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", target, source],
        check=True,
        timeout=170,
    )
    assert files_in(source) == files_in(target / "moe_kernels")
    program = tmp_path / "program.py"
    program.write_text(RUNS_A_LAYER)
    done = subprocess.run(
        [sys.executable, program, target],
        cwd=tmp_path,
        env={"PYTHONPATH": str(target), "PATH": ""},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[5, 5, 5, 5]"
