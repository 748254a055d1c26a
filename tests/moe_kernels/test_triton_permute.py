"""Triton dispatch, combine and experts equal the torch code, forward and backward, on every shape."""

import pytest
import torch

from moe_kernels import TopKConfig
from moe_kernels.dispatch import combine, dispatch, run_experts
from moe_kernels.experts import SwigluExperts, swiglu_loop
from moe_kernels.triton_kernels import grouped
from moe_kernels.types import Routing

TOLERANCE = {torch.float64: 1e-11, torch.float32: 2e-5, torch.bfloat16: 2e-2}
ROUTINGS = [(7, 3, 2, 5), (1, 4, 1, 3), (33, 5, 3, 70), (5, 1, 1, 16), (0, 3, 2, 4), (3, 9, 2, 8)]
COUNTS = [[3, 0, 5, 1], [0, 0, 0, 40], [0, 0, 0, 0], [33, 2, 17, 31], [70]]


def random_routing(num_tokens, num_experts, copies, device, seed=0, dtype=torch.float64, is_shuffled=False):
    generator = torch.Generator().manual_seed(seed)
    expert_N = torch.rand(num_tokens, num_experts, generator=generator).argsort(1)[:, :copies].reshape(-1)
    token_N = torch.arange(num_tokens).repeat_interleave(copies)
    order_N = torch.randperm(expert_N.numel(), generator=generator) if is_shuffled else torch.arange(expert_N.numel())
    return Routing(
        token_N=token_N[order_N].to(device),
        expert_N=expert_N[order_N].to(device),
        weight_N=torch.rand(expert_N.numel(), generator=generator, dtype=dtype).to(device),
        num_tokens=num_tokens,
        num_experts=num_experts,
        is_real_T=torch.ones(num_tokens, dtype=torch.bool, device=device),
    )


def check(fast, slow, dtype):
    assert len(fast) == len(slow)
    for got, expected in zip(fast, slow, strict=True):
        assert got.shape == expected.shape
        expected = expected.double().cpu()
        scale = max(1.0, float(expected.detach().abs().max())) if expected.numel() else 1.0
        bound = TOLERANCE[dtype]
        torch.testing.assert_close(got.double().cpu() / scale, expected / scale, atol=bound, rtol=bound)


def through(x, routing, upstream, backend):
    x, weight = x.clone().requires_grad_(), routing.weight_N.clone().requires_grad_()
    dispatched = dispatch(x, Routing(**{**vars(routing), "weight_N": weight}), backend=backend)
    y = combine(dispatched.rows_ND.sin(), dispatched, backend=backend)
    return [dispatched.rows_ND.detach(), y.detach(), *torch.autograd.grad(y, (x, weight), upstream)]


@pytest.mark.parametrize(("num_tokens", "num_experts", "copies", "width"), ROUTINGS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("is_shuffled", [False, True])
def test_dispatch_and_combine(num_tokens, num_experts, copies, width, dtype, is_shuffled, triton_device):
    weight_dtype = torch.promote_types(dtype, torch.float32)
    routing = random_routing(num_tokens, num_experts, copies, triton_device, 1, weight_dtype, is_shuffled)
    x = torch.randn(num_tokens, width, generator=torch.Generator().manual_seed(2)).to(triton_device, dtype)
    upstream = torch.randn(num_tokens, width, generator=torch.Generator().manual_seed(3)).to(triton_device, dtype)
    fast = through(x, routing, upstream, "triton")
    assert fast[0].dtype == fast[1].dtype == fast[2].dtype == dtype
    wide = Routing(**{**vars(routing), "weight_N": routing.weight_N.double()})
    check(fast, through(x.double(), wide, upstream.double(), "torch"), dtype)


def test_gradcheck_of_dispatch_and_combine(triton_device):
    routing = random_routing(4, 3, 2, triton_device)

    def function(x, weight):
        dispatched = dispatch(x, Routing(**{**vars(routing), "weight_N": weight}), backend="triton")
        return combine(dispatched.rows_ND.sin(), dispatched, backend="triton")

    x = torch.randn(4, 3, dtype=torch.float64, device=triton_device, requires_grad=True)
    assert torch.autograd.gradcheck(function, (x, routing.weight_N.clone().requires_grad_()))


def run_swiglu(function, rows, counts, weights, upstream):
    inputs = [value.clone().requires_grad_() for value in (rows, *weights)]
    out = function(inputs[0], counts, tuple(inputs[1:]))
    return [out.detach(), *torch.autograd.grad(out, inputs, upstream)]


def make_weights(num_experts, width, hidden_width, dtype, device):
    generator = torch.Generator().manual_seed(5)
    shapes = [(num_experts, width, hidden_width)] * 2 + [(num_experts, hidden_width, width)]
    return [(torch.randn(shape, generator=generator) / shape[1] ** 0.5).to(device, dtype) for shape in shapes]


@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize(("width", "hidden_width"), [(16, 24), (40, 33)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_experts(counts, width, hidden_width, dtype, triton_device):
    weights = make_weights(len(counts), width, hidden_width, dtype, triton_device)
    generator = torch.Generator().manual_seed(6)
    rows, upstream = (torch.randn(sum(counts), width, generator=generator).to(triton_device, dtype) for _ in range(2))
    counts = torch.tensor(counts, device=triton_device)
    fast = run_swiglu(grouped.swiglu_rows, rows, counts, weights, upstream)
    wide = [weight.double() for weight in weights]
    check(fast, run_swiglu(swiglu_loop, rows.double(), counts, wide, upstream.double()), dtype)


def test_gradcheck_of_experts(triton_device):
    weights = [weight.requires_grad_() for weight in make_weights(3, 3, 4, torch.float64, triton_device)]
    rows = torch.randn(4, 3, dtype=torch.float64, device=triton_device, requires_grad=True)
    counts = torch.tensor([1, 0, 3], device=triton_device)
    assert torch.autograd.gradcheck(lambda x, *w: grouped.swiglu_rows(x, counts, w), (rows, *weights), fast_mode=True)


@pytest.mark.parametrize(("num_tokens", "num_experts", "copies", "width"), ROUTINGS)
def test_experts_that_read_tokens_in_place(num_tokens, num_experts, copies, width, triton_device):
    routing = random_routing(num_tokens, num_experts, copies, triton_device, 4, torch.float32, is_shuffled=True)
    torch.manual_seed(0)
    experts = SwigluExperts(num_experts, width, 20, backend="triton").to(triton_device)
    x = torch.randn(num_tokens, width, device=triton_device)
    upstream = torch.randn(num_tokens, width, device=triton_device)
    results = []
    for backend in ("triton", "loop"):
        experts.backend = backend
        state, weight = x.clone().requires_grad_(), routing.weight_N.clone().requires_grad_()
        out = run_experts(state, Routing(**{**vars(routing), "weight_N": weight}), experts)
        results.append([out.detach(), *torch.autograd.grad(out, (state, weight, *experts.parameters()), upstream)])
    check(*results, torch.float32)


def test_sums_are_the_same_whichever_rows_the_experts_fill(triton_device):
    """Renumbering experts moves rows, but not the order in which a token's results are added up."""
    routing = random_routing(20, 4, 3, triton_device, dtype=torch.float32)
    renumbered = Routing(**{**vars(routing), "expert_N": 3 - routing.expert_N})
    x = torch.randn(20, 33, device=triton_device)
    sums = []
    for each in (routing, renumbered):
        dispatched = dispatch(x, each, backend="triton")
        sums.append(combine(dispatched.rows_ND, dispatched, backend="triton"))
    assert torch.equal(*sums)


def test_tiles_of_every_height_are_mapped(triton_device):
    for rows_per_tile in (16, 64):
        for counts in ([0, 1, 16, 17, 0, 64, 65, 0], [5], [0, 0], [0, 0, 128]):
            tile_map = grouped.map_tiles(torch.tensor(counts, device=triton_device), sum(counts), rows_per_tile)
            expected, first = [], 0
            for expert, count in enumerate(counts):
                expected += [(expert, first + start, first + count) for start in range(0, count, rows_per_tile)]
                first += count
            found = list(zip(*(values.tolist() for values in tile_map.tensors()), strict=True))
            assert found[: len(expected)] == expected
            assert all(expert == -1 for expert, _, _ in found[len(expected) :])


@pytest.mark.parametrize("k", [1, 2])
def test_a_whole_layer(k, triton_device):
    torch.manual_seed(0)
    layer = TopKConfig(width=24, hidden_width=32, num_experts=4, experts_per_token=k, backend="triton").build()
    layer.to(triton_device)
    x = torch.randn(2, 13, 24, device=triton_device)
    results = []
    for backend in ("triton", "loop"):
        layer.experts.backend = backend
        layer.router.backend = "triton" if backend == "triton" else "torch"
        state = x.clone().requires_grad_()
        out = layer(state)
        assert out.statistics.counts_E.sum() == 26 * k
        loss = out.hidden.square().sum() + out.losses["load_balance"] + out.losses["z"]
        results.append([out.hidden.detach(), *torch.autograd.grad(loss, (state, *layer.parameters()))])
    check(*results, torch.float32)


def test_inference_keeps_nothing(triton_device):
    weights = make_weights(2, 16, 16, torch.float32, triton_device)
    rows, counts = torch.randn(5, 16, device=triton_device), torch.tensor([2, 3], device=triton_device)
    with torch.no_grad():
        out = grouped.swiglu_rows(rows, counts, tuple(weight.requires_grad_() for weight in weights))
    assert not out.requires_grad
    check([out], [swiglu_loop(rows, counts, tuple(weights))], torch.float32)


def test_bad_values_are_refused(triton_device, monkeypatch):
    with pytest.raises(ValueError, match="convert rows or weights"):
        grouped.swiglu_rows(
            torch.zeros(2, 4, device=triton_device),
            torch.tensor([2], device=triton_device),
            tuple(make_weights(1, 4, 4, torch.bfloat16, triton_device)),
        )
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(ValueError, match="TRITON_INTERPRET=1"):
        dispatch(torch.zeros(2, 4), random_routing(2, 1, 1, "cpu"), backend="triton")
    with pytest.raises(ValueError, match="auto, torch, triton"):
        dispatch(torch.zeros(2, 4), random_routing(2, 1, 1, "cpu"), backend="cuda")
