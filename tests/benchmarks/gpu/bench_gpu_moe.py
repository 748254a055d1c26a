"""Triton kernels on a GPU against the best of torch, in one run; `make bench` leaves this out, since it needs CUDA.

    python tests/benchmarks/gpu/bench_gpu_moe.py                 # every table
    python tests/benchmarks/gpu/bench_gpu_moe.py experts tiles   # some: ceilings, experts, tiles, routing, assignment

Every result is checked against its reference on the benchmark's own random inputs before it is timed. Times are medians
by `triton.testing.do_bench`, which clears the cache between repeats; the assignment, whose host looks at the device now
and then, is timed by the clock of the host.
"""

import argparse
import dataclasses
import statistics
import time
from collections.abc import Callable

import torch
from torch.nn import functional

from moe_kernels import assign_balanced, solve_assignment
from moe_kernels.dispatch import run_experts
from moe_kernels.experts import SwigluExperts
from moe_kernels.routers import TopKRouter
from moe_kernels.selection import top_tokens
from moe_kernels.triton_kernels import grouped
from moe_kernels.triton_kernels.routing import route_top_k
from moe_kernels.types import Routing, TokenInfo

LAYERS = ((32768, 4096, 1024, 128, 8), (16384, 2048, 768, 128, 8))  # T, D, F, E, K
ROUTES = ((65536, 128, 8), (16384, 64, 8))
ASSIGNMENTS = ((65536, 128), (16384, 64), (4096, 8))
TILES = (
    grouped.Tiles(rows=128, columns=128, inner=64, num_warps=8, num_stages=3),
    grouped.Tiles(rows=128, columns=128, inner=64, num_warps=8, num_stages=4),
    grouped.Tiles(rows=128, columns=128, inner=64, num_warps=4, num_stages=3),
    grouped.Tiles(rows=128, columns=128, inner=32, num_warps=8, num_stages=4),
    grouped.Tiles(rows=128, columns=64, inner=64, num_warps=4, num_stages=4),
    grouped.Tiles(rows=64, columns=128, inner=64, num_warps=4, num_stages=4),
    grouped.Tiles(rows=128, columns=256, inner=64, num_warps=8, num_stages=3),
)


def milliseconds(function: Callable[[], object]) -> float:
    """Median time of a call on the device."""
    from triton.testing import do_bench

    return do_bench(function, warmup=50, rep=300, return_mode="median")


def error(got: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative error in the Frobenius norm; NaN where something is not finite."""
    return float((got.double() - expected.double()).norm() / expected.double().norm())


def ceilings() -> tuple[float, float]:
    """TFLOP/s of a large matrix product, and TB/s of a large copy, read plus written."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    matmul = 2 * 8192**3 / milliseconds(lambda: a @ b) / 1e9
    source = torch.randn(2**29, device="cuda")
    target = torch.empty_like(source)
    copy = 2 * source.numel() * 4 / milliseconds(lambda: target.copy_(source)) / 1e9
    print(f"ceilings: matmul {matmul:.0f} TFLOP/s, copy {copy:.2f} TB/s", flush=True)
    return matmul, copy


def make_layer(num_tokens: int, width: int, hidden_width: int, num_experts: int, count: int):
    """Tokens, a routing by a random router, and experts."""
    torch.manual_seed(0)
    experts = SwigluExperts(num_experts, width, hidden_width).to("cuda", torch.bfloat16)
    router = TopKRouter(width, num_experts, count).cuda()
    x_TD = torch.randn(num_tokens, width, device="cuda", dtype=torch.bfloat16).requires_grad_()
    routing: Routing = router(x_TD, TokenInfo())
    routing = dataclasses.replace(routing, weight_N=routing.weight_N.detach(), logits_TE=None, probs_TE=None)
    return x_TD, routing, experts, torch.randn_like(x_TD)


def grouped_mm_layer(x_TD: torch.Tensor, routing: Routing, experts: SwigluExperts) -> torch.Tensor:
    """Sort, gather, `grouped_mm`, weighted `index_add`: what is written with torch alone."""
    order_N = routing.expert_N.argsort(stable=True)
    token_N = routing.token_N[order_N]
    ends_E = torch.bincount(routing.expert_N, minlength=routing.num_experts).cumsum(0).to(torch.int32)
    rows_ND = x_TD[token_N]
    gate_NF = functional.silu(functional.grouped_mm(rows_ND, experts.w1_EDF, offs=ends_E))
    hidden_NF = gate_NF * functional.grouped_mm(rows_ND, experts.w3_EDF, offs=ends_E)
    out_ND = functional.grouped_mm(hidden_NF, experts.w2_EFD, offs=ends_E)
    weighted_ND = out_ND * routing.weight_N[order_N].to(out_ND.dtype).unsqueeze(1)
    return torch.zeros_like(x_TD).index_add(0, token_N, weighted_ND)


def dense(x_TD: torch.Tensor, experts: SwigluExperts, count: int) -> Callable[[], object]:
    """One dense SwiGLU network of equal FLOPs by cuBLAS: a hidden width of K * F for every token."""
    width, hidden_width = experts.w1_EDF.shape[1:]
    shapes = ((width, count * hidden_width), (width, count * hidden_width), (count * hidden_width, width))
    w1, w3, w2 = (torch.randn(shape, device="cuda", dtype=torch.bfloat16).requires_grad_() for shape in shapes)
    gradient = torch.randn_like(x_TD)
    return lambda: ((functional.silu(x_TD @ w1) * (x_TD @ w3)) @ w2).backward(gradient)


def bench_experts(shape: tuple[int, int, int, int, int], matmul: float) -> None:
    """Layers forward and backward."""
    num_tokens, width, hidden_width, _, count = shape
    x_TD, routing, experts, gradient = make_layer(*shape)
    plain, ours = grouped_mm_layer(x_TD, routing, experts), run_experts(x_TD, routing, experts)
    inputs = (x_TD, *experts.parameters())
    errors = [error(ours, plain)]
    for got, expected in zip(*(torch.autograd.grad(y, inputs, gradient) for y in (ours, plain)), strict=True):
        errors.append(error(got, expected))
    flops = 18 * num_tokens * count * width * hidden_width
    times = {
        "ours": milliseconds(lambda: run_experts(x_TD, routing, experts).backward(gradient)),
        "grouped_mm": milliseconds(lambda: grouped_mm_layer(x_TD, routing, experts).backward(gradient)),
        "dense": milliseconds(dense(x_TD, experts, count)),
    }
    print(f"experts T, D, F, E, K = {shape}: errors against grouped_mm {' '.join(f'{e:.1e}' for e in errors)}")
    for name, value in times.items():
        rate = flops / value / 1e9
        ratio = times["grouped_mm"] / value
        print(f"  {name:>10} {value:8.2f} ms {rate:6.0f} TFLOP/s, {rate / matmul:4.0%} of the ceiling, {ratio:.2f} x")


def bench_tiles() -> None:
    """The expert products with other tiles; put the best into `tiles_for`."""
    num_tokens, width, hidden_width, num_experts, count = LAYERS[0]
    rows_ND = torch.randn(num_tokens * count, width, device="cuda", dtype=torch.bfloat16).requires_grad_()
    counts_E = torch.full((num_experts,), num_tokens * count // num_experts, device="cuda")
    experts = SwigluExperts(num_experts, width, hidden_width).to("cuda", torch.bfloat16)
    gradient, chosen = torch.randn_like(rows_ND), grouped.tiles_for
    for tiles in TILES:
        grouped.tiles_for = lambda *_, chosen=tiles: chosen
        try:
            forward = milliseconds(
                lambda: grouped.swiglu_rows(rows_ND.detach(), counts_E, experts.weights(rows_ND.dtype))
            )
            both = milliseconds(
                lambda: grouped.swiglu_rows(rows_ND, counts_E, experts.weights(rows_ND.dtype)).backward(gradient)
            )
            print(f"{tiles}: forward {forward:.2f} ms, with backward {both:.2f} ms", flush=True)
        except Exception as failure:  # one that needs too much shared memory must not end the table
            print(f"{tiles}: {type(failure).__name__}", flush=True)
        finally:
            grouped.tiles_for = chosen


def plain_route(logits_TE: torch.Tensor, count: int) -> object:
    """Token choice in torch."""
    weight_TK, expert_TK = logits_TE.softmax(-1).topk(count, -1)
    flat = expert_TK.view(-1)
    bins = torch.bincount(flat, minlength=logits_TE.shape[1])
    return weight_TK / weight_TK.sum(-1, keepdim=True), flat.argsort(stable=True), bins


def bench_routing(num_tokens: int, num_experts: int, count: int, copy: float) -> None:
    """Token choice and expert choice."""
    logits_TE = torch.randn(num_tokens, num_experts, device="cuda")
    capacity = num_tokens // num_experts
    assert torch.equal(top_tokens(logits_TE, capacity), logits_TE.t().topk(capacity).indices.sort(1).values)
    pairs = {
        "token choice": (lambda: plain_route(logits_TE, count), lambda: route_top_k(logits_TE, count)),
        "expert choice": (
            lambda: logits_TE.t().topk(capacity).indices.sort(1), lambda: top_tokens(logits_TE, capacity),
        ),
    }  # fmt: skip
    written = {"token choice": num_tokens * count * (8 + 4 + 16), "expert choice": 8 * num_tokens}
    for name, (plain, ours) in pairs.items():
        slow, fast = milliseconds(plain), milliseconds(ours)
        bound = (4 * num_tokens * num_experts + written[name]) / copy / 1e9
        print(
            f"{num_tokens:>6} x {num_experts:<4} k {count} {name:>14}: torch {slow:.3f} ms, ours {fast:.3f} ms, "
            f"{slow / fast:.1f} x, {fast / bound:.1f} times its bytes",
            flush=True,
        )


def host_milliseconds(function: Callable[[], object], repeats: int = 9) -> float:
    """Median time of a call that waits for the device."""
    times = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        start = time.perf_counter()
        function()
        torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times[1:])


def bench_assignment(num_tokens: int, num_experts: int, kind: str, offset: float) -> None:
    """The auction with epsilon scaling, the exact method on the CPU with copies, the published auction."""
    torch.manual_seed(0)
    scores_TE = torch.randn(num_tokens, num_experts, device="cuda")
    scores_TE += offset * torch.randn(num_experts, device="cuda")
    solved, exact = (solve_assignment(scores_TE, backend=backend) for backend in ("triton", "torch"))
    best, total = (float(scores_TE.double().gather(1, each.expert_T[:, None]).sum()) for each in (exact, solved))
    assert torch.bincount(solved.expert_T, minlength=num_experts).unique().numel() == 1
    assert best - total <= solved.gap + 1e-9 * abs(best)
    ours = host_milliseconds(lambda: assign_balanced(scores_TE, backend="triton"))
    host = host_milliseconds(lambda: assign_balanced(scores_TE, backend="torch"))
    published = host_milliseconds(lambda: assign_balanced(scores_TE, method="auction"))
    print(
        f"assignment {num_tokens} x {num_experts} {kind}: ours {ours:.2f} ms in {solved.num_sweeps} rounds, exact "
        f"on the CPU {host:.2f} ms, published auction {published:.2f} ms, {published / ours:.1f} x, "
        f"regret {best - total:.2e} of {best:.3e}",
        flush=True,
    )


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = ("ceilings", "experts", "tiles", "routing", "assignment")
    parser.add_argument("tables", nargs="*", choices=[[], *names], default=[], help="which tables (default all)")
    wanted = parser.parse_args().tables or names
    print(f"torch {torch.__version__}, {torch.cuda.get_device_name()}")
    matmul, copy = ceilings()
    if "experts" in wanted:
        for shape in LAYERS:
            bench_experts(shape, matmul)
    if "tiles" in wanted:
        bench_tiles()
    if "routing" in wanted:
        for route in ROUTES:
            bench_routing(*route, copy)
    if "assignment" in wanted:
        for size in ASSIGNMENTS:
            for kind, offset in (("iid", 0.0), ("skew", 2.0)):
                bench_assignment(*size, kind, offset)


if __name__ == "__main__":
    main()
