"""Compile every Triton kernel for a GPU that is not there, and print what each takes of it.

    TRITON_INTERPRET=0 python tests/moe_kernels/compile_kernels.py [sm]      # 90 for Hopper (default), 80 for Ampere

Launches are replaced by compilations for the arguments of the launch; nothing runs. One line per kernel: name, dtype of
the first tensor, registers per thread, bytes spilled per thread, shared memory in bytes.
"""

import re
import subprocess
import sys
import tempfile
from pathlib import Path

# ruff: noqa: TID253
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from moe_kernels.dispatch import order_by_token
from moe_kernels.epsilon_auction import AuctionState
from moe_kernels.triton_kernels import auction, grouped, permute, routing

OPTIONS = ("num_warps", "num_stages")
NAMES = {
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.int8: "i8",
    torch.int32: "i32",
    torch.int64: "i64",
}
TARGET = GPUTarget("cuda", int(sys.argv[1]) if len(sys.argv) > 1 else 90, 32)


def resources(cubin: bytes) -> tuple[int, int]:
    """Registers and stack bytes of a thread."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    return tuple(int(re.search(rf"{name}:(\d+)", text)[1]) for name in ("REG", "STACK"))


def compile_launch(kernel, grid, *arguments, **meta):
    """Stands in for `moe_kernels.triton_kernels.runtime.launch`."""
    options = {name: meta.pop(name) for name in OPTIONS if name in meta}
    signature, constants, attributes = {}, {}, {}
    for index, (name, value) in enumerate(zip(kernel.arg_names, arguments, strict=False)):
        if value is None:
            signature[name], constants[name] = "constexpr", None
            continue
        signature[name] = "*" + NAMES[value.dtype] if isinstance(value, torch.Tensor) else "i32"
        if isinstance(value, torch.Tensor) or value % 16 == 0:
            attributes[index,] = [["tt.divisibility", 16]]
    for name, value in meta.items():
        signature[name], constants[name] = "constexpr", value
    source = ASTSource(kernel, {name: signature[name] for name in kernel.arg_names}, constants, attributes)
    compiled = triton.compile(source, target=TARGET, options=options)
    registers, stack = resources(compiled.asm["cubin"])
    dtype = next(NAMES[value.dtype] for value in arguments if isinstance(value, torch.Tensor))
    print(f"{kernel.__name__:<20} {dtype:<5} {registers:>4} {stack:>5} {compiled.metadata.shared:>7}", flush=True)


def run_experts(dtype: torch.dtype) -> None:
    """Dispatch, experts, combine, forward and backward."""
    x_TD = torch.randn(256, 512).to(dtype).requires_grad_()
    expert_N = torch.zeros(512, dtype=torch.int64)
    token_N = torch.arange(256).repeat_interleave(2)
    weight_N = torch.rand(512, dtype=torch.promote_types(dtype, torch.float32), requires_grad=True)
    by_token = order_by_token(token_N, 256)
    weights = [torch.randn(shape).to(dtype).requires_grad_() for shape in ((4, 512, 256), (4, 512, 256), (4, 256, 512))]
    counts_E = torch.full((4,), 128)
    rows_ND = permute.permute(x_TD, token_N, expert_N, by_token)
    for out_ND in (
        grouped.swiglu_rows(rows_ND, counts_E, tuple(weights)),
        grouped.swiglu_tokens(x_TD, token_N, expert_N, by_token, counts_E, tuple(weights)),
    ):
        permute.unpermute(out_ND, weight_N, token_N, expert_N, by_token).sum().backward()


def run_routing() -> None:
    """Token choice, sorting, expert choice."""
    logits_TE = torch.randn(4096, 128, requires_grad=True)
    for score, is_renormalised in (("softmax", True), ("sigmoid", False)):
        expert_TK, weight_TK, probs_TE, _ = routing.route_top_k(
            logits_TE, 8, score=score, is_renormalised=is_renormalised
        )
        (weight_TK.sum() + probs_TE.sum()).backward()
    routing.top_experts(logits_TE, 8)
    routing.sort_copies(expert_TK.view(-1), 128)
    routing.top_tokens(logits_TE, 32)
    group_T, group_E = torch.zeros(4096, dtype=torch.int64), torch.zeros(128, dtype=torch.int64)
    routing.choose_in_groups(logits_TE, group_T, group_E, torch.full((128,), 32))


def run_rounds(num_tokens: int, num_experts: int) -> None:
    """A round of the auction."""
    ints = {name: torch.zeros(num_tokens, dtype=torch.int32) for name in ("expert_T", "bid_T")}
    ints |= {name: torch.zeros(num_experts, dtype=torch.int32) for name in ("price_E", "idle_E")}
    score_TE = torch.zeros(num_tokens, num_experts, dtype=torch.int32)
    places = -(-num_tokens // num_experts)
    state = AuctionState(score_TE=score_TE, num_idle=-num_tokens % num_experts, places=places, **ints)
    auction.RoundsInTriton(score_TE)(state, 8)


if __name__ == "__main__":
    for module in (auction, grouped, permute, routing):
        module.launch = compile_launch
    run_routing()
    run_rounds(4096, 128)
    run_rounds(5, 7)
    for each in (torch.bfloat16, torch.float32, torch.float64):
        run_experts(each)
