"""Everything that a DeepSpeed engine imports, imported before processes are forked, so that each has it at once."""

import importlib

import pytest

pytest.importorskip("deepspeed")

for name in (
    "networkx",
    "setuptools.dist",
    "torch._dynamo",
    "torch._export",
    "torch._functorch.aot_autograd",
    "torch._inductor.compile_fx",
    "deepspeed.comm",
    "deepspeed.moe.layer",
    "deepspeed.module_inject.auto_ep_layer",
    "deepspeed.ops.adam",
    "deepspeed.runtime.engine",
    "deepspeed.runtime.zero.stage3",
    "btm.train.deepspeed_engine",
):
    importlib.import_module(name)
