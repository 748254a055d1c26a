"""Every code block of the package's README runs, and stays short."""

import re
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
    assert len(BLOCKS) == 6
