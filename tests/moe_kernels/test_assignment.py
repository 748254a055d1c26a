"""Balanced assignment: invariants A1 to A6 against scipy, native and torch code alike."""

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment

from moe_kernels import assign_balanced, solve_assignment
from moe_kernels.assignment import _replace_native, replace_nonfinite
from moe_kernels.assignment_torch import solve_exact
from moe_kernels.native import load_library

KINDS = ("iid", "skew", "token", "zeros", "rows", "onehot", "integer", "duplicates", "clusters", "outlier", "popular")


def make_token_scores(num_tokens, num_experts, rng):
    topics = rng.standard_normal((40, 16))
    popularity = 1 / np.arange(1, 41)
    states = topics[rng.choice(40, num_tokens, p=popularity / popularity.sum())]
    return (states + 0.3 * rng.standard_normal(states.shape)) @ rng.standard_normal((16, num_experts))


def make_scores(kind, num_tokens, num_experts, seed):
    rng = np.random.default_rng(seed)
    noise = rng.standard_normal((num_tokens, num_experts))
    outlier, popular = noise.copy(), noise.copy()
    outlier[0, 0] = 1e4
    popular[:, num_experts // 2] += 9
    return {
        "iid": noise,
        "skew": noise + 2 * rng.standard_normal(num_experts),
        "token": make_token_scores(num_tokens, num_experts, rng),
        "zeros": 0 * noise,
        "rows": np.tile(noise[:1], (num_tokens, 1)),
        "onehot": np.eye(num_experts)[np.zeros(num_tokens, dtype=int)],
        "integer": rng.integers(0, 4, noise.shape).astype(float),
        "duplicates": noise[np.arange(num_tokens) // 8],
        "clusters": rng.standard_normal((3, num_experts))[rng.integers(0, 3, num_tokens)] + 1e-3 * noise,
        "outlier": outlier,
        "popular": popular,
    }[kind]


def total_of(scores, expert):
    return float(scores.double().gather(1, expert[:, None]).sum())


def best_total(scores):
    """The optimum by scipy: ceil(T/E) slots per expert, of which idle tokens may take only the last."""
    num_tokens, num_experts = scores.shape
    ceiling = -(-num_tokens // num_experts)
    slots = np.repeat(scores, ceiling, axis=1)
    idle = np.full((num_experts * ceiling - num_tokens, slots.shape[1]), -1e9)
    idle[:, ceiling - 1 :: ceiling] = 0
    rows, columns = linear_sum_assignment(np.vstack([slots, idle]), maximize=True)
    real = rows < num_tokens
    return slots[rows[real], columns[real]].sum()


def cases(count):
    rng = np.random.default_rng(7)
    for index in range(count):
        num_tokens, num_experts = int(rng.integers(1, 110)), int(rng.integers(2, 36))
        scores = make_scores(KINDS[index % len(KINDS)], num_tokens, num_experts, index)
        if index % 4 == 0:
            scores = (10 * scores).round()
        yield scores if index % 3 == 0 else scores.astype(np.float32)


def check(scores, expert):
    num_tokens, num_experts = scores.shape
    load = np.bincount(expert, minlength=num_experts)
    assert len(load) == num_experts
    assert load.min() >= num_tokens // num_experts
    assert load.max() <= -(-num_tokens // num_experts)
    total, best = scores.astype(np.float64)[np.arange(num_tokens), expert].sum(), best_total(scores.astype(np.float64))
    assert total == pytest.approx(best, rel=1e-9, abs=1e-9)


def test_native_library_is_built():
    assert load_library("assignment") is not None, "this machine has a compiler, so the native code must be in use"


def test_a1_a2_a5_exact_and_balanced_on_264_instances():
    for scores in cases(264):
        check(scores, assign_balanced(torch.from_numpy(scores)).numpy())


def test_a1_a2_a5_torch_code_exact_and_balanced_on_88_instances():
    for scores in cases(88):
        expert, _, (_, overflow, paths) = solve_exact(torch.from_numpy(scores).double(), None)
        check(scores, expert.numpy())
        assert paths <= overflow + scores.shape[0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("num_tokens", "num_experts"), [(4096, 8), (3001, 64)])
def test_a2_prices_prove_the_optimum_where_scipy_is_too_slow(kind, num_tokens, num_experts):
    scores = torch.from_numpy(make_scores(kind, num_tokens, num_experts, 3)).float()
    solved = solve_assignment(scores)
    load = torch.bincount(solved.expert_T, minlength=num_experts)
    value = scores.double() - solved.prices_E
    chosen = value.gather(1, solved.expert_T[:, None]).squeeze(1)
    assert float((value.amax(1) - chosen).max()) < 1e-9
    floor, room = divmod(num_tokens, num_experts)
    assert int(((load - floor) == 1).sum()) == room
    assert set((load - floor).tolist()) <= {0, 1}
    if room:
        assert float(solved.prices_E[load > floor].min()) >= float(solved.prices_E[load == floor].max()) - 1e-9


def test_a1_edge_shapes():
    assert assign_balanced(torch.randn(5, 1)).tolist() == [0] * 5
    assert assign_balanced(torch.randn(0, 4)).shape == (0,)
    few = assign_balanced(torch.randn(3, 50))
    assert len(set(few.tolist())) == 3
    assert assign_balanced(torch.tensor([[0.0, 3.0, 1.0]])).tolist() == [1]


def test_a3_row_and_column_shifts_do_not_change_the_answer():
    scores = torch.from_numpy(make_scores("token", 512, 8, 5))
    plain = assign_balanced(scores)
    assert torch.equal(assign_balanced(scores + torch.randn(512, 1, dtype=torch.float64)), plain)
    assert torch.equal(assign_balanced(scores + 5 * torch.randn(8, dtype=torch.float64)), plain)


def test_permuting_tokens_permutes_the_answer():
    scores = torch.from_numpy(make_scores("iid", 700, 12, 2))
    order = torch.randperm(700, generator=torch.Generator().manual_seed(0))
    assert torch.equal(assign_balanced(scores[order]), assign_balanced(scores)[order])


def test_a4_what_is_not_finite_is_replaced_and_counted():
    scores = torch.randn(64, 4, generator=torch.Generator().manual_seed(1))
    clean = scores.clone()
    scores[3] = torch.nan
    scores[9, 1] = -torch.inf
    scores[11, 2] = torch.inf
    finite = scores[torch.isfinite(scores)]
    clean[3], clean[9, 1], clean[11, 2] = finite.min(), finite.min(), finite.max()
    solved = solve_assignment(scores)
    assert solved.num_replaced == 6
    assert torch.equal(solved.expert_T, assign_balanced(clean))
    assert torch.bincount(assign_balanced(torch.full((8, 4), torch.nan)), minlength=4).tolist() == [2, 2, 2, 2]


@pytest.mark.parametrize("scale", [1e-35, 1e36, 1e305])
def test_a4_extreme_magnitudes(scale):
    base = torch.from_numpy(make_scores("iid", 90, 6, 4))
    scores = base * scale if scale > 1e100 else (base * scale).float()
    check((scores.double() / scale).numpy(), assign_balanced(scores).numpy())


def test_a6_deterministic_over_threads_and_repeats():
    scores = torch.from_numpy(make_scores("token", 20000, 32, 9)).float()
    before = torch.get_num_threads()
    answers = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        answers.append(assign_balanced(scores))
    torch.set_num_threads(before)
    assert all(torch.equal(answers[0], other) for other in answers)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a6_short_dtypes_agree_with_float64(dtype):
    scores = torch.randn(300, 7, generator=torch.Generator().manual_seed(3)).to(dtype)
    short, long = assign_balanced(scores), assign_balanced(scores.double())
    assert total_of(scores, short) == pytest.approx(total_of(scores, long), rel=1e-12)


def test_warm_start_keeps_the_total_and_saves_passes():
    scores = torch.from_numpy(make_scores("token", 8192, 32, 1)).float()
    cold = solve_assignment(scores)
    warm = solve_assignment(scores + 0.001 * torch.randn(8192, 32), warm_prices_E=cold.prices_E)
    assert warm.num_sweeps <= 5
    again = solve_assignment(scores, warm_prices_E=torch.randn(32))
    assert total_of(scores, again.expert_T) == pytest.approx(total_of(scores, cold.expert_T), rel=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_auction_is_balanced_and_near_the_best(kind):
    scores = torch.from_numpy(make_scores(kind, 512, 8, 6)).float()
    expert = assign_balanced(scores, method="auction")
    assert torch.bincount(expert, minlength=8).tolist() == [64] * 8
    best, mean = total_of(scores, assign_balanced(scores)), float(scores.double().mean(1).sum())
    regret = best - total_of(scores, expert)
    assert regret >= -1e-6
    assert regret <= (0.05 * (best - mean) if kind != "outlier" else 200)  # its epsilon is a share of the whole range


@pytest.mark.parametrize(
    ("scores", "words"),
    [
        (torch.zeros(4), "flatten leading axes"),
        (torch.zeros(4, 0), "at least one expert"),
        (torch.zeros(4, 2, dtype=torch.int64), r"convert with \.float"),
    ],
)
def test_bad_scores_are_refused(scores, words):
    with pytest.raises(ValueError, match=words):
        assign_balanced(scores)


def test_bad_methods_prices_and_auction_shapes_are_refused():
    with pytest.raises(ValueError, match="exact, auction"):
        assign_balanced(torch.zeros(4, 2), method="sinkhorn")
    with pytest.raises(ValueError, match="65 x 4"):
        assign_balanced(torch.zeros(65, 4), method="auction")
    with pytest.raises(ValueError, match="warm_prices_E"):
        solve_assignment(torch.zeros(4, 2), warm_prices_E=torch.zeros(3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a5_native_replacement_equals_torch(dtype):
    library = load_library("assignment")
    assert library is not None
    scores = torch.randn(700, 60, dtype=dtype, generator=torch.Generator().manual_seed(0))
    scores[::5], scores[1::5, 3], scores[2::5, :7] = torch.inf, -torch.inf, torch.nan
    scores[4, 4] = torch.finfo(dtype).max
    empty = torch.full((3, 4), torch.nan, dtype=dtype)
    for case in (scores, empty, -torch.inf * torch.ones(2, 2, dtype=dtype)):
        (fast, count), (slow, expected) = _replace_native(library, case), replace_nonfinite(case)
        assert torch.equal(fast, slow)
        assert count == expected
