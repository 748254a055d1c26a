"""Experts over 1, 2 and 4 processes equal those of one process: L1, L3, L5, L7."""

import pytest
import torch
import torch.distributed as dist
from torch.utils.checkpoint import checkpoint

from moe_kernels import BaseConfig, TokenInfo, TopKConfig
from moe_kernels.exchange import ExchangeError, exchange
from moe_kernels.expert_parallel import (
    ExpertParallelExperts,
    average_gradients,
    clip_gradients,
    owned_experts,
    spread_experts,
)
from moe_kernels.experts import SwigluExperts
from moe_kernels.routers import DomainRouter
from tests.moe_kernels.processes import run_processes

pytestmark = pytest.mark.distributed

WIDTH, CLIP = 8, 0.05


def make_layer(kind):
    torch.manual_seed(0)
    if kind == "top_k":
        layer = TopKConfig(width=WIDTH, hidden_width=6, num_experts=5, shared_hidden_width=4, backend="loop").build()
    else:
        layer = BaseConfig(width=WIDTH, hidden_width=6, num_experts=5).build()
        for parameter in layer.parameters():
            torch.nn.init.normal_(parameter, std=0.4)
        layer.eval()
    return layer.double()


def batch(rank, world, micro):
    generator = torch.Generator().manual_seed(100 * micro)
    return torch.randn(12, WIDTH, dtype=torch.float64, generator=generator).tensor_split(world)[rank]


def split_parameters(layer):
    local = list(layer.experts.parameters())
    shared = [p for name, p in layer.named_parameters() if not name.startswith("experts.")]
    return shared, local


def full_gradients(layer):
    """Gradients of all experts by the names of the undivided module."""
    named = layer.experts.local.named_parameters()
    return layer.experts.gather_full({name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in named})


def train_step(kind, num_micro):
    def run(rank, world):
        layer = make_layer(kind)
        layer.experts = ExpertParallelExperts(layer.experts, dist.group.WORLD)
        losses = []
        for micro in range(num_micro):
            out = layer(batch(rank, world, micro))
            loss = out.hidden.square().mean() / num_micro
            loss.backward()
            losses.append(loss.item())
        shared, local = split_parameters(layer)
        average_gradients(shared, dist.group.WORLD)
        gradients = [p.grad.clone() for p in shared], full_gradients(layer)
        norm = clip_gradients(shared, local, CLIP, dist.group.WORLD)
        return sum(losses), gradients, norm, [p.grad.clone() for p in shared], full_gradients(layer)

    return run


def single_step(kind, num_micro):
    layer = make_layer(kind)
    loss = sum(layer(batch(0, 1, micro)).hidden.square().mean() / num_micro for micro in range(num_micro))
    loss.backward()
    shared, local = split_parameters(layer)
    for parameter in local:
        parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    gradients = [p.grad.clone() for p in shared], {n: p.grad.clone() for n, p in layer.experts.named_parameters()}
    norm = torch.nn.utils.clip_grad_norm_(layer.parameters(), CLIP)
    return loss.item(), gradients, norm.item(), [p.grad.clone() for p in shared]


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("kind", ["top_k", "base"])
@pytest.mark.parametrize("num_micro", [1, 2])
def test_l1_l3_loss_gradients_and_clip_norm_equal_one_process(world, kind, num_micro, tmp_path):
    loss, (shared, experts), norm, clipped = single_step(kind, num_micro)
    results = run_processes(train_step(kind, num_micro), world, tmp_path)
    assert sum(result[0] for result in results) / world == pytest.approx(loss, rel=1e-12)
    for _, (rank_shared, rank_experts), rank_norm, rank_clipped, _ in results:
        for got, expected in zip(rank_shared + rank_clipped, shared + clipped, strict=True):
            torch.testing.assert_close(got, expected)
        assert rank_experts.keys() == experts.keys()
        for name, expected in experts.items():
            torch.testing.assert_close(rank_experts[name], expected)
        assert rank_norm == pytest.approx(norm, rel=1e-10)


def recomputed(rank, world):
    """Output, input gradient and expert gradients, with and without running the layer again in the backward pass."""
    results = []
    for is_recomputed in (False, True):
        layer = make_layer("top_k")
        spread_experts(layer, dist.group.WORLD)
        x = batch(rank, world, 0).clone().requires_grad_()

        def forward(x, layer=layer):
            return layer(x).hidden

        out = checkpoint(forward, x, use_reentrant=False) if is_recomputed else forward(x)
        out.square().sum().backward()
        results.append([out.detach(), x.grad, *full_gradients(layer).values()])
    return results


def test_l4_activation_checkpointing_changes_nothing(tmp_path):
    for plain, again in run_processes(recomputed, 2, tmp_path):
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(plain, again, strict=True))


def uneven(rank, world):
    layer = make_layer("top_k")
    layer.experts = ExpertParallelExperts(layer.experts, dist.group.WORLD)
    counts = [5, 0, 1, 6]
    x = batch(0, 1, 0).split(counts)[rank]
    out = layer(x)
    out.hidden.square().sum().backward()
    return out.hidden.detach(), full_gradients(layer)


def test_l7_unequal_and_empty_ranks_finish_with_the_same_result(tmp_path):
    results = run_processes(uneven, 4, tmp_path)
    layer = make_layer("top_k")
    out = layer(batch(0, 1, 0))
    out.hidden.square().sum().backward()
    torch.testing.assert_close(torch.cat([hidden for hidden, _ in results]), out.hidden.detach())
    for name, parameter in layer.experts.named_parameters():
        torch.testing.assert_close(results[1][1][name], parameter.grad / 4)


def all_to_one(rank, world):
    layer = TopKConfig(width=WIDTH, hidden_width=6, num_experts=4, backend="loop").build().double()
    layer.router = DomainRouter(4)
    layer.experts = ExpertParallelExperts(layer.experts, dist.group.WORLD)
    out = layer(batch(rank, world, 0), TokenInfo(domain_T=torch.full((12 // world,), 3)))
    out.hidden.sum().backward()
    return [float(p.grad.abs().sum()) for p in layer.experts.parameters()]


def test_l7_ranks_whose_experts_get_no_token_finish(tmp_path):
    idle, busy = run_processes(all_to_one, 2, tmp_path)
    assert sum(idle) == 0
    assert min(busy) > 0


def reshard(rank, world):
    layer = make_layer("base")
    layer.experts = ExpertParallelExperts(layer.experts, dist.group.WORLD)
    return layer.experts.full_state()


def test_l5_the_state_of_any_number_of_ranks_is_the_state_of_one(tmp_path):
    expected = make_layer("base").experts.state_dict()
    for world in (1, 2, 4):
        for state in run_processes(reshard, world, tmp_path):
            assert state.keys() == expected.keys()
            assert all(torch.equal(state[name], expected[name]) for name in expected)
    make_layer("base").experts.load_state_dict(expected)


def shuffled(rank, world):
    torch.manual_seed(rank)
    layer = make_layer("base").train()
    torch.manual_seed(rank)
    layer.shuffle_group = dist.group.WORLD
    layer.experts = ExpertParallelExperts(layer.experts, dist.group.WORLD)
    x = batch(0, 1, 0).split([7, 5])[rank].clone().requires_grad_()
    mask = torch.arange(len(x)) != 2
    out = layer(x, TokenInfo(is_real_T=mask))
    out.hidden.square().sum().backward()
    return out.hidden.detach(), x.grad, out.statistics.counts_E, mask, x.detach()


def test_base_shuffle_brings_every_token_back(tmp_path):
    layer = make_layer("base")
    for hidden, gradient, counts, mask, x in run_processes(shuffled, 2, tmp_path):
        assert counts.max() - counts.min() <= 1
        assert torch.equal(hidden[~mask], x[~mask])
        assert torch.isfinite(gradient).all()
        candidates = torch.stack(
            [
                x + torch.sigmoid(x @ layer.router.centroids()[e])[:, None] * expert(x)
                for e, expert in enumerate(layer.experts.experts)
            ]
        )
        distance = (candidates - hidden).abs().amax(-1).amin(0)
        assert float(distance[mask].detach().max()) < 1e-9, "each token met one of the experts"


def checked_exchange(rank, world):
    send, receive = ([1, 2], [1, 3]) if rank == 0 else ([3, 0], [2, 0])
    rows = torch.randn(sum(send), 2, dtype=torch.float64, requires_grad=True)
    out = exchange(rows, send, receive, dist.group.WORLD)
    back = exchange(out, receive, send, dist.group.WORLD)
    weight = torch.arange(rows.numel(), dtype=torch.float64).view_as(rows)
    (back * weight).sum().backward()
    return torch.equal(back, rows) and torch.equal(rows.grad, weight)


def checked_gradient(rank, world):
    rows = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    return torch.autograd.gradcheck(lambda x: exchange(x, [3], [3], dist.group.WORLD).sin(), (rows,))


def test_exchange_and_back_is_the_identity_on_values_and_gradients(tmp_path):
    assert run_processes(checked_exchange, 2, tmp_path) == [True, True]
    assert run_processes(checked_gradient, 1, tmp_path) == [True]


def one_rank_stays_away(rank, world):
    layer = make_layer("top_k")
    layer.experts = ExpertParallelExperts(layer.experts, dist.group.WORLD)
    if rank == 1:
        return "away"
    with pytest.raises(ExchangeError, match="every rank must call the layer"):
        layer(batch(rank, world, 0))
    return "told"


def test_l7_a_missing_rank_is_told_with_a_clear_message(tmp_path):
    assert run_processes(one_rank_stays_away, 2, tmp_path) == ["told", "away"]


def other_width(rank, world):
    torch.manual_seed(0)
    width = 8 + rank
    experts = ExpertParallelExperts(SwigluExperts(2, width, 4, backend="loop"), dist.group.WORLD)
    with pytest.raises(ValueError, match=r"model width over the ranks: got \[8, 9\]"):
        experts(torch.zeros(2, width), torch.tensor([1, 1]))
    return True


def test_another_width_on_one_rank_is_refused_everywhere(tmp_path):
    assert all(run_processes(other_width, 2, tmp_path))


def too_few(rank, world):
    with pytest.raises(ValueError, match="experts over ranks: got 1; allowed: at least 2"):
        ExpertParallelExperts(SwigluExperts(1, 8, 4), dist.group.WORLD)
    with pytest.raises(ValueError, match="put modules into an ExpertList"):
        ExpertParallelExperts.__init__(ExpertParallelExperts.__new__(ExpertParallelExperts), Odd(), dist.group.WORLD)
    return True


class Odd(torch.nn.Module):
    num_experts = 2


def test_fewer_experts_than_ranks_and_unknown_experts_are_refused(tmp_path):
    assert all(run_processes(too_few, 2, tmp_path))


@pytest.mark.parametrize(("num_experts", "world"), [(8, 4), (5, 4), (4, 4), (7, 1)])
def test_every_expert_has_one_owner(num_experts, world):
    shares = [owned_experts(num_experts, world, rank) for rank in range(world)]
    assert [expert for share in shares for expert in share] == list(range(num_experts))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


class Stack(torch.nn.Module):
    """Layers of both kinds of experts, three of each: the last of four ranks holds none."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first = TopKConfig(width=WIDTH, hidden_width=6, num_experts=3, backend="loop").build()
        self.second = BaseConfig(width=WIDTH, hidden_width=6, num_experts=3).build().eval()
        for parameter in self.second.parameters():
            torch.nn.init.normal_(parameter, std=0.4)

    def forward(self, x):
        return self.second(x + self.first(x).hidden).hidden


def sums_over_few_experts(rank, world):
    model = Stack().double()
    spread = spread_experts(model, dist.group.WORLD, loss="sum", allows_empty=True)
    assert list(spread) == ["first.experts", "second.experts"]
    loss = model(batch(rank, world, 0)).square().sum()
    loss.backward()
    names = dict(model.named_parameters())
    gradients = {path: full_gradients(getattr(model, path.split(".")[0])) for path in spread}
    whole = {path: experts.full_state() for path, experts in spread.items()}
    if rank == 0:
        for path, experts in spread.items():
            again = experts.undivided(whole[path]).state_dict()
            assert all(torch.equal(again[name], tensor) for name, tensor in whole[path].items())
    return loss.item(), gradients, whole, len(names)


def test_l7_sums_of_losses_and_ranks_without_experts(tmp_path):
    """With ``loss="sum"`` an expert's gradient is that of the sum over all ranks, whatever rank holds it."""
    model = Stack().double()
    loss = model(batch(0, 1, 0)).square().sum()
    loss.backward()
    results = run_processes(sums_over_few_experts, 4, tmp_path)
    assert sum(result[0] for result in results) == pytest.approx(loss.item(), rel=1e-12)
    assert len({result[3] for result in results}) == 2, "one rank has fewer parameters"
    for _, gradients, whole, _ in results:
        for path, found in gradients.items():
            experts = model.get_submodule(path)
            assert found.keys() == whole[path].keys() == dict(experts.named_parameters()).keys()
            for name, parameter in experts.named_parameters():
                assert torch.equal(whole[path][name], parameter)
                expected = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                torch.testing.assert_close(found[name], expected)


def test_ranks_without_experts_are_the_last_ones():
    assert [len(owned_experts(3, 4, rank, allows_empty=True)) for rank in range(4)] == [1, 1, 1, 0]
    with pytest.raises(ValueError, match="loss: got 'both'"):
        ExpertParallelExperts(SwigluExperts(1, 8, 4), None, loss="both")
