"""Every code block of the package's README runs, and stays short."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import moe_kernels

BLOCKS = re.findall(r"```python\n(.*?)```", (Path(moe_kernels.__file__).parent / "README.md").read_text(), re.DOTALL)


@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_block_runs(block):
    assert len(block.strip().splitlines()) <= 12
    torch.manual_seed(0)
    exec(block, {})


def test_there_are_blocks():
    assert len(BLOCKS) == 7


def test_the_package_loads_torch_and_nothing_of_ours_or_of_others():
    others = {"btm", "launch", "transformers", "scipy", "ray", "triton", "hydra"}
    code = f"import sys, moe_kernels, moe_kernels.placement; print(sorted({others} & set(sys.modules)))"
    root = Path(moe_kernels.__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.strip() == "[]"
