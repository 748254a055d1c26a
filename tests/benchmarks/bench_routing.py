"""Routing and one expert layer on the CPU against torch operations, interleaved in one process.

    python tests/benchmarks/bench_routing.py              # memory kept between steps (glibc mallopt), for all sides
    python tests/benchmarks/bench_routing.py --untuned    # with torch's own allocator settings

Token choice: softmax, topk, renormalise, stable argsort, bincount. Expert choice: topk of the columns. Layer: SwiGLU,
T 4096, d 512, bfloat16, no dropped token, forward and backward, once with the same batch again and again and once with
a new one each time, whose experts get other numbers of tokens, as in training. The references are the shortest use of
grouped_mm and transformers' grouped_mm experts on the same weights; the bound is the layer's FLOPs at the speed of bare
bfloat16 products of 2048 x 2048 in this process. megatron-core has no CPU code of its own for it (per-expert products).
"""

import argparse
import copy
import ctypes
import os
import statistics
import time
from collections.abc import Callable

import torch
from speed_table import Line, close
from torch.nn import functional

from moe_kernels import TopKConfig
from moe_kernels.layers import RoutedLayer
from moe_kernels.selection import sort_copies, top_tokens, weighted_experts

SHAPES = ((4096, 8, 2), (4096, 64, 8), (16384, 64, 8), (65536, 128, 8))
LAYERS = {"A": (8, 1024, 2), "B": (64, 256, 8)}
LAYER_GOALS = {"A": 2.0, "B": 2.9}


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


def bench_routing(repeats: int) -> list[Line]:
    """Both kinds of routing."""
    lines = []
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
            shape = f"{num_tokens} x {num_experts}, k {count}"
            print(
                f"{shape:>18} {name:>14}: torch {least['torch']:7.2f} ms, ours {least['ours']:7.3f} ms, "
                f"{ratio:.1f} times",
                flush=True,
            )
            goal = 10.0 if num_experts >= 64 else None
            lines.append(Line(what=f"{name} {shape}, torch / ours", figure=ratio, floor=2.0, goal=goal))
    return lines


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


def transformers_layer(layer: RoutedLayer, num_experts: int, count: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """Mixtral's experts by transformers' grouped_mm, routed alike, with copies of the layer's weights."""
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    w1, w3, w2 = (layer.experts.get_parameter(name).detach() for name in ("w1_EDF", "w3_EDF", "w2_EFD"))
    config = MixtralConfig(
        hidden_size=w1.shape[1],
        intermediate_size=w1.shape[2],
        num_local_experts=num_experts,
        num_experts_per_tok=count,
        experts_implementation="grouped_mm",  # pyright: ignore[reportCallIssue]
    )
    experts = MixtralExperts(config).to(torch.bfloat16)
    with torch.no_grad():
        experts.get_parameter("gate_up_proj").copy_(torch.cat([w1, w3], dim=2).mT)
        experts.get_parameter("down_proj").copy_(w2.mT)
    router = copy.deepcopy(layer.router.get_parameter("weight_ED"))

    def run(x_TD: torch.Tensor) -> torch.Tensor:
        weight_TK, expert_TK = (x_TD.float() @ router.float().t()).softmax(-1).topk(count, -1)
        weight_TK = weight_TK / weight_TK.sum(-1, keepdim=True)
        return experts(x_TD, expert_TK, weight_TK.to(x_TD.dtype))

    return run


def matmul_rate() -> float:
    """FLOP/s of bare bfloat16 products."""
    a, b = (torch.randn(2048, 2048, dtype=torch.bfloat16) for _ in range(2))
    return 2 * 2048**3 / (1e-3 * interleaved({"mm": lambda: a @ b.t()}, 5)["mm"])


def bench_layers(repeats: int) -> list[Line]:
    """Forward and backward of whole layers."""
    lines = []
    for name, (num_experts, hidden_width, count) in LAYERS.items():
        config = TopKConfig(width=512, hidden_width=hidden_width, num_experts=num_experts, experts_per_token=count)
        layer = config.build().to(torch.bfloat16)
        gradient_TD = torch.randn(4096, 512, dtype=torch.bfloat16)
        forwards: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
            "grouped_mm": lambda x, m=layer, e=num_experts, k=count: plain_layer(m, x, e, k),
            "transformers": transformers_layer(layer, num_experts, count),
            "ours": lambda x, m=layer: m(x).hidden,
        }
        bound = 1e3 * 18 * 4096 * count * 512 * hidden_width / matmul_rate()
        for kind, is_new in (("one batch", False), ("new batches", True)):
            times = {who: list[float]() for who in forwards}
            for repeat in range(max(repeats, 2)):
                generator = torch.Generator().manual_seed(repeat if is_new else 0)
                x_TD = torch.randn(4096, 512, generator=generator).to(torch.bfloat16).requires_grad_()
                for who, forward in forwards.items():
                    run = {who: lambda f=forward, x=x_TD, g=gradient_TD: f(x).backward(g)}
                    times[who].append(interleaved(run, 1)[who])
            # with new batches the typical one counts: the fastest would be one whose shapes were met before
            figure = {who: (statistics.median if is_new else min)(values[1:]) for who, values in times.items()}
            best = min(figure["grouped_mm"], figure["transformers"])
            shown = ", ".join(f"{who} {value:.1f}" for who, value in figure.items())
            print(f"layer {name}, {kind}: {shown} ms, bare products {bound:.1f} ms", flush=True)
            what = f"layer {name} bf16, {kind}: best of peers / ours"
            lines.append(Line(what=what, figure=best / figure["ours"], floor=1.0, goal=LAYER_GOALS[name]))
    return lines


def main() -> None:
    """Print all tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--untuned", action="store_true", help="give freed memory back to the system, as glibc does")
    parser.add_argument("--repeats", type=int, default=9, help="interleaved repeats (default 9)")
    parser.add_argument("--quick", action="store_true", help="one repeat")
    options = parser.parse_args()
    options.repeats = 1 if options.quick else options.repeats
    if not options.untuned:
        libc = ctypes.CDLL(None)
        for option, value in ((-4, 0), (-1, 2**31 - 1), (-2, 256 << 20)):
            libc.mallopt(option, value)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, load average {os.getloadavg()[0]:.2f} before")
    lines = [*bench_routing(options.repeats), *bench_layers(options.repeats)]
    print(f"load average {os.getloadavg()[0]:.2f} after")
    close(lines)


if __name__ == "__main__":
    main()
