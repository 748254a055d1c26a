"""Routing and one expert layer on the CPU against torch operations, interleaved in one process.

    python tests/benchmarks/bench_routing.py            # with torch's own allocator settings
    python tests/benchmarks/bench_routing.py --tuned    # memory kept between steps (glibc mallopt), for both sides

Token choice: softmax, topk, renormalise, stable argsort, bincount. Expert choice: topk of the columns. Layer: SwiGLU,
T 4096, d 512, bfloat16, no dropped token, forward and backward; the reference is the shortest use of grouped_mm.
"""

import argparse
import ctypes
import os
import time
from collections.abc import Callable

import torch
from torch.nn import functional

from moe_kernels import TopKConfig
from moe_kernels.layers import RoutedLayer
from moe_kernels.selection import sort_copies, top_tokens, weighted_experts

SHAPES = ((4096, 8, 2), (4096, 64, 8), (16384, 64, 8), (65536, 128, 8))
LAYERS = {"A": (8, 1024, 2), "B": (64, 256, 8)}


def interleaved(functions: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Least milliseconds of each function."""
    least = dict.fromkeys(functions, float("inf"))
    for _ in range(repeats):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            least[name] = min(least[name], 1e3 * (time.perf_counter() - start))
    return least


def torch_token_choice(logits_TE: torch.Tensor, count: int) -> object:
    """What libraries do without a kernel."""
    weight_TK, expert_TK = logits_TE.softmax(-1).topk(count, -1)
    flat = expert_TK.reshape(-1)
    bins = torch.bincount(flat, minlength=logits_TE.shape[1])
    return weight_TK / weight_TK.sum(-1, keepdim=True), flat.argsort(stable=True), bins


def our_token_choice(logits_TE: torch.Tensor, count: int) -> object:
    """The same with this library's selection."""
    expert_TK, weight_TK = weighted_experts(logits_TE, count)
    return weight_TK, sort_copies(expert_TK.reshape(-1), logits_TE.shape[1])


def bench_routing(repeats: int) -> None:
    """Both kinds of routing."""
    for num_tokens, num_experts, count in SHAPES:
        logits_TE = torch.randn(num_tokens, num_experts)
        capacity = num_tokens // num_experts
        token = {
            "torch": lambda x=logits_TE, k=count: torch_token_choice(x, k),
            "ours": lambda x=logits_TE, k=count: our_token_choice(x, k),
        }
        expert = {
            "torch": lambda x=logits_TE, c=capacity: x.t().topk(c, dim=1),
            "ours": lambda x=logits_TE, c=capacity: top_tokens(x, c),
        }
        for name, functions in (("token choice", token), ("expert choice", expert)):
            least = interleaved(functions, repeats)
            ratio = least["torch"] / least["ours"]
            print(
                f"{num_tokens:>6} x {num_experts:<4} k {count} {name:>14}: torch {least['torch']:7.2f} ms, "
                f"ours {least['ours']:7.2f} ms, {ratio:.1f} times",
                flush=True,
            )


def plain_layer(layer: RoutedLayer, x_TD: torch.Tensor, num_experts: int, count: int) -> torch.Tensor:
    """Sort and grouped_mm, written straight down, with the layer's own weights."""
    logits_TE = x_TD.float() @ layer.router.get_parameter("weight_ED").float().t()
    weight_TK, expert_TK = logits_TE.softmax(-1).topk(count, -1)
    weight_TK = weight_TK / weight_TK.sum(-1, keepdim=True)
    order_N = expert_TK.reshape(-1).argsort(stable=True)
    ends_E = torch.bincount(expert_TK.reshape(-1), minlength=num_experts).cumsum(0).to(torch.int32)
    rows_ND = x_TD[order_N // count]
    w1, w3, w2 = (layer.experts.get_parameter(name) for name in ("w1_EDF", "w3_EDF", "w2_EFD"))
    gate_NF = functional.silu(functional.grouped_mm(rows_ND, w1, offs=ends_E))
    hidden_NF = gate_NF * functional.grouped_mm(rows_ND, w3, offs=ends_E)
    out_ND = functional.grouped_mm(hidden_NF, w2, offs=ends_E)
    weighted_ND = out_ND * weight_TK.reshape(-1)[order_N].to(x_TD.dtype).unsqueeze(1)
    return torch.zeros_like(x_TD).index_add(0, order_N // count, weighted_ND)


def bench_layers(repeats: int) -> None:
    """Forward and backward of whole layers."""
    for name, (num_experts, hidden_width, count) in LAYERS.items():
        config = TopKConfig(width=512, hidden_width=hidden_width, num_experts=num_experts, experts_per_token=count)
        layer = config.build().to(torch.bfloat16)
        x_TD = torch.randn(4096, 512, dtype=torch.bfloat16, requires_grad=True)
        gradient_TD = torch.randn(4096, 512, dtype=torch.bfloat16)
        functions = {
            "plain": lambda m=layer, x=x_TD, g=gradient_TD, e=num_experts, k=count: plain_layer(m, x, e, k).backward(g),
            "ours": lambda m=layer, x=x_TD, g=gradient_TD: m(x).hidden.backward(g),
        }
        least = interleaved(functions, repeats)
        print(f"layer {name}: grouped_mm {least['plain']:.1f} ms, ours {least['ours']:.1f} ms", flush=True)


def main() -> None:
    """Print all tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tuned", action="store_true", help="keep freed memory in the process")
    parser.add_argument("--repeats", type=int, default=7, help="interleaved repeats (default 7)")
    parser.add_argument("--quick", action="store_true", help="one repeat")
    options = parser.parse_args()
    options.repeats = 1 if options.quick else options.repeats
    if options.tuned:
        libc = ctypes.CDLL(None)
        for option, value in ((-4, 0), (-1, 2**31 - 1), (-2, 256 << 20)):
            libc.mallopt(option, value)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, load average {os.getloadavg()[0]:.2f} before")
    bench_routing(options.repeats)
    bench_layers(options.repeats)
    print(f"load average {os.getloadavg()[0]:.2f} after")


if __name__ == "__main__":
    main()
