"""Balanced assignment against the published auction and scipy, interleaved in one process.

    python tests/benchmarks/bench_assignment.py            # every shape and kind, about two minutes
    python tests/benchmarks/bench_assignment.py --quick    # two small shapes

The reference is our own implementation of the published auction, made of the same torch operations as the released
operator. Times are the least of the repeats; `total` is the share of the optimum that the auction reaches.
"""

import argparse
import os
import time

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from speed_table import Line, close

from moe_kernels import assign_balanced, solve_assignment

SHAPES = ((4096, 8), (4096, 64), (16384, 64), (65536, 64), (65536, 128))
GOAL_MS = {(4096, 8): 0.2, (4096, 64): 0.8, (16384, 64): 3.5, (65536, 64): 15.0, (65536, 128): 25.0}
KINDS = ("token", "skew", "iid")
HARD_KINDS = ("zeros", "rows", "onehot", "duplicates", "clusters", "infinite rows")


def make_scores(kind: str, num_tokens: int, num_experts: int) -> torch.Tensor:
    """Scores of a kind: token = popular topics times random experts, skew = popular experts, iid = noise."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(num_tokens, num_experts, generator=generator)
    if kind == "token":
        num_topics = max(2 * num_experts, 64)
        topics = torch.randn(num_topics, 64, generator=generator)
        topic_T = torch.multinomial(1 / torch.arange(1, num_topics + 1), num_tokens, True, generator=generator)
        states = topics[topic_T] + 0.5 * torch.randn(num_tokens, 64, generator=generator)
        return states @ torch.randn(64, num_experts, generator=generator) / 8
    if kind == "clusters":
        centres = torch.randn(4, num_experts, generator=generator)
        return centres[torch.randint(4, (num_tokens,), generator=generator)] + 1e-3 * noise
    if kind == "infinite rows":
        noise[::7] = torch.inf
        noise[3::7] = -torch.inf
        return noise
    onehot = torch.zeros(num_tokens, num_experts)
    onehot[:, 0] = 1
    return {
        "iid": noise,
        "skew": noise + 2 * torch.randn(num_experts, generator=generator),
        "zeros": torch.zeros(num_tokens, num_experts),
        "rows": noise[:1].repeat(num_tokens, 1),
        "onehot": onehot,
        "duplicates": noise[torch.arange(num_tokens) // 16],
    }[kind]


def timed(function) -> tuple[float, object]:
    """Milliseconds of one call, and its result."""
    start = time.perf_counter()
    result = function()
    return 1e3 * (time.perf_counter() - start), result


def total_of(scores_TE: torch.Tensor, expert_T: torch.Tensor) -> float:
    """Total score of an assignment."""
    return float(scores_TE.double().gather(1, expert_T[:, None]).sum())


def bench_case(kind: str, num_tokens: int, num_experts: int, repeats: int) -> dict[str, float]:
    """Interleaved times of exact, warm exact and auction, in milliseconds."""
    scores_TE = make_scores(kind, num_tokens, num_experts)
    solved = solve_assignment(scores_TE)
    next_TE = scores_TE + 0.01 * scores_TE.std() * torch.randn_like(scores_TE)
    times: dict[str, list[float]] = {"exact": [], "warm": [], "auction": []}
    auction_T = solved.expert_T
    for repeat in range(repeats):
        times["exact"].append(timed(lambda: assign_balanced(scores_TE))[0])
        times["warm"].append(timed(lambda: solve_assignment(next_TE, warm_prices_E=solved.prices_E))[0])
        if repeat < max(1, repeats // 2):
            elapsed, auction_T = timed(lambda: assign_balanced(scores_TE, method="auction"))
            times["auction"].append(elapsed)
    row = {name: min(values) for name, values in times.items()}
    row["share"] = 100 * total_of(scores_TE, auction_T) / total_of(scores_TE, solved.expert_T)
    row["warm_sweeps"] = solve_assignment(next_TE, warm_prices_E=solved.prices_E).num_sweeps
    return row


def bench_published(shapes, repeats: int) -> list[Line]:
    """The table of ordinary scores."""
    lines = []
    print("       T x E   kind  exact ms   goal  auction ms  ratio  total %  warm ms")
    for num_tokens, num_experts in shapes:
        rows, goal = list[dict[str, float]](), GOAL_MS[num_tokens, num_experts]
        for kind in KINDS:
            row = bench_case(kind, num_tokens, num_experts, repeats)
            rows.append(row)
            print(
                f"{num_tokens:>7} x {num_experts:<3}{kind:>6} {row['exact']:9.2f} {goal:6.1f} "
                f"{row['auction']:11.1f} {row['auction'] / row['exact']:6.1f} {row['share']:8.3f} {row['warm']:8.2f}"
                f"  ({row['warm_sweeps']:.0f} sweeps)",
                flush=True,
            )
        shape = f"{num_tokens} x {num_experts}"
        ratio, slowest = min(row["auction"] / row["exact"] for row in rows), max(row["exact"] for row in rows)
        sweeps = max(row["warm_sweeps"] for row in rows)
        lines += [
            Line(what=f"exact assignment {shape}, auction / ours, worst kind", figure=ratio, floor=5.0, goal=20.0),
            Line(what=f"exact assignment {shape}, slowest kind", figure=slowest, goal=goal, at_most=True, unit="ms"),
            Line(what=f"warm assignment {shape}, sweeps", figure=sweeps, goal=5.0, at_most=True),
        ]
    return lines


def bench_hard(num_tokens: int, num_experts: int, repeats: int) -> Line:
    """Worst inputs against the typical one."""
    ratios = []
    iid_TE = make_scores("iid", num_tokens, num_experts)
    typical = min(timed(lambda: assign_balanced(iid_TE))[0] for _ in range(repeats))
    for kind in HARD_KINDS:
        scores_TE = make_scores(kind, num_tokens, num_experts)
        worst = min(timed(lambda s=scores_TE: assign_balanced(s))[0] for _ in range(repeats))
        print(
            f"{num_tokens:>7} x {num_experts:<3} {kind:>14}: {worst:8.2f} ms, {worst / typical:.1f} times iid",
            flush=True,
        )
        ratios.append(worst / typical)
    return Line(what="worst input of the assignment / typical", figure=max(ratios), goal=3.0, at_most=True)


def bench_scipy(num_tokens: int, num_experts: int) -> None:
    """The expansion to a square problem, for scale."""
    scores_TE = make_scores("iid", num_tokens, num_experts)
    square = np.repeat(scores_TE.double().numpy(), num_tokens // num_experts, axis=1)
    slow, (rows, columns) = timed(lambda: linear_sum_assignment(square, maximize=True))
    fast, expert_T = timed(lambda: assign_balanced(scores_TE))
    gap = abs(square[rows, columns].sum() - total_of(scores_TE, expert_T))
    print(
        f"scipy {num_tokens} x {num_experts} iid: {slow:.0f} ms, ours {fast:.2f} ms ({slow / fast:.0f}x), gap {gap:.1e}"
    )


def main() -> None:
    """Print all tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two small shapes only")
    parser.add_argument("--repeats", type=int, default=5, help="interleaved repeats (default 5)")
    options = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, load average {os.getloadavg()[0]:.2f} before")
    lines = bench_published(SHAPES[:2] if options.quick else SHAPES, options.repeats)
    lines.append(bench_hard(*((4096, 64) if options.quick else (65536, 128)), options.repeats))
    bench_scipy(2048, 8)
    print(f"load average {os.getloadavg()[0]:.2f} after")
    close(lines)


if __name__ == "__main__":
    main()
