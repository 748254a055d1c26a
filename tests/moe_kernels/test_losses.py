"""Balancing loss and z-loss: the convention, padding, the global batch (L6), recompute (L4)."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from moe_kernels import TokenInfo, TopKConfig
from moe_kernels.losses import BalanceBuffer, load_balancing_loss, load_fractions, z_loss
from moe_kernels.routers import TopKRouter
from moe_kernels.types import Routing


def routing_of(probs, expert_TK):
    return Routing(
        token_N=torch.arange(len(probs)).repeat_interleave(expert_TK.shape[1]),
        expert_N=expert_TK.reshape(-1),
        weight_N=torch.ones(expert_TK.numel()),
        num_tokens=len(probs),
        num_experts=probs.shape[1],
        is_real_T=torch.ones(len(probs), dtype=torch.bool),
        probs_TE=probs,
        logits_TE=probs.log(),
    )


def test_balanced_is_one_and_collapsed_is_the_number_of_experts():
    uniform = torch.full((12, 4), 0.25)
    balanced = torch.arange(24).reshape(12, 2) % 4
    assert float(load_balancing_loss(routing_of(uniform, balanced))) == pytest.approx(1.0)
    collapsed = torch.nn.functional.one_hot(torch.zeros(12, dtype=torch.int64), 4).float()
    assert float(load_balancing_loss(routing_of(collapsed, torch.zeros(12, 1, dtype=torch.int64)))) == pytest.approx(
        4.0
    )
    assert load_fractions(torch.zeros(4, dtype=torch.int64)).tolist() == [0.25] * 4


def test_padding_counts_in_no_loss():
    router = TopKRouter(8, 5, 2).double()
    x = torch.randn(10, 8, dtype=torch.float64)
    padded = torch.cat([x[:4], 50 * torch.randn(6, 8, dtype=torch.float64), x[4:]])
    mask = torch.tensor([True] * 4 + [False] * 6 + [True] * 6)
    short, long = router(x, TokenInfo()), router(padded, TokenInfo(is_real_T=mask))
    for loss in (load_balancing_loss, z_loss):
        torch.testing.assert_close(loss(long), loss(short))
    assert torch.equal(long.expert_counts(), short.expert_counts())


def test_l6_mean_over_ranks_of_the_global_loss_is_the_loss_of_the_whole_batch():
    router = TopKRouter(6, 8, 2).double()
    shards = torch.randn(4, 20, 6, dtype=torch.float64) + 2 * torch.randn(4, 1, 6, dtype=torch.float64)
    whole = load_balancing_loss(router(shards.reshape(-1, 6), TokenInfo()))
    (expected,) = torch.autograd.grad(whole, router.weight_ED)
    routings = [router(shard, TokenInfo()) for shard in shards]
    fraction_E = load_fractions(torch.stack([routing.expert_counts() for routing in routings]).sum(0))
    mean = torch.stack([load_balancing_loss(routing, fraction_E) for routing in routings]).mean()
    (gradient,) = torch.autograd.grad(mean, router.weight_ED)
    torch.testing.assert_close(mean, whole)
    torch.testing.assert_close(gradient, expected)
    micro = torch.stack([load_balancing_loss(routing) for routing in routings]).mean()
    assert micro.item() > whole.item() + 0.1


def test_buffer_accumulates_over_micro_batches_resets_and_resumes():
    buffer = BalanceBuffer(3)
    first, second = torch.tensor([4, 0, 0]), torch.tensor([0, 2, 2])
    assert buffer.observe(first).tolist() == [1, 0, 0]
    assert buffer.observe(first).tolist() == [1, 0, 0], "a recomputed forward pass counts once"
    buffer.next_micro_batch()
    resumed = BalanceBuffer(3)
    resumed.load_state_dict(buffer.state_dict())
    for each in (buffer, resumed):
        assert each.observe(second).tolist() == [0.5, 0.25, 0.25]
    buffer.reset()
    assert buffer.observe(second).tolist() == [0, 0.5, 0.5]


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_l4_activation_checkpointing_changes_nothing(use_reentrant):
    torch.manual_seed(0)
    config = TopKConfig(width=8, hidden_width=8, num_experts=4, is_globally_balanced=True, backend="loop")
    layer = config.build().double()
    x = torch.randn(3, 5, 8, dtype=torch.float64, requires_grad=True)
    layer.balance.before_E += torch.tensor([5, 0, 1, 0])

    def run(states):
        out = layer(states)
        return out.hidden, out.losses["load_balance"]

    results = []
    for wrapped in (run, lambda states: checkpoint(run, states, use_reentrant=use_reentrant)):
        hidden, loss = wrapped(x)
        layer.zero_grad()
        x.grad = None
        (hidden.square().sum() + loss).backward()
        gradients = [p.grad.clone() for p in layer.parameters()]
        results.append([hidden.detach(), loss.detach(), x.grad, *gradients, layer.balance.current_E.clone()])
    for plain, checkpointed in zip(*results, strict=True):
        assert torch.equal(plain, checkpointed)
