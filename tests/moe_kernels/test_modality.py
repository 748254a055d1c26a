"""Modality-aware layers: groups, capacity, gates, auxiliary routers, upcycling."""

import copy

import pytest
import torch

from moe_kernels import ModalityConfig, TokenInfo, check_causality
from moe_kernels.experts import SwigluFfn
from moe_kernels.layers.modality import prediction_loss

MODALITY = torch.tensor([0] * 13 + [1] * 8)


def build(**options):
    torch.manual_seed(0)
    return ModalityConfig(width=8, hidden_width=12, group_sizes=(3, 2), **options).build()


def info_of(modality=MODALITY):
    return TokenInfo(modality_T=modality)


def test_each_expert_takes_its_share_of_its_own_modality():
    layer, x = build(), torch.randn(21, 8)
    routing = layer.router(x, info_of())
    assert routing.expert_counts().tolist() == [4, 4, 4, 4, 4]
    assert torch.equal(layer.router.modality_E[routing.expert_N], MODALITY[routing.token_N])
    few = layer.router(x[:14], info_of(MODALITY[:14]))
    assert few.expert_counts().tolist() == [4, 4, 4, 1, 1], "at least one token"
    assert layer.router(x[:13], info_of(MODALITY[:13])).expert_counts().tolist() == [4, 4, 4, 0, 0]


def test_permuting_tokens_permutes_the_result():
    layer, x = build().double(), torch.randn(21, 8, dtype=torch.float64)
    order = torch.randperm(21)
    permuted = layer(x[order], info_of(MODALITY[order])).hidden
    torch.testing.assert_close(permuted, layer(x, info_of()).hidden[order])


def test_other_tokens_change_membership_but_no_score():
    layer, x = build(), torch.randn(21, 8)
    changed = x.clone()
    changed[5:] = 4 * torch.randn(16, 8)
    before, after = (layer.router(states, info_of()) for states in (x, changed))

    def weights(routing):
        entries = zip(routing.token_N.tolist(), routing.expert_N.tolist(), routing.weight_N.tolist(), strict=True)
        return {(token, expert): weight for token, expert, weight in entries if token < 5}

    old, new = weights(before), weights(after)
    assert old.keys() != new.keys()
    assert all(old[pair] == pytest.approx(new[pair], rel=1e-6) for pair in old.keys() & new.keys())


def test_one_expert_per_modality_is_two_dense_networks():
    torch.manual_seed(0)
    layer = ModalityConfig(width=8, hidden_width=12, group_sizes=(1, 1)).build().double()
    seeds = [SwigluFfn(8, 12).double() for _ in range(2)]
    layer.upcycle({m: (s.w1.weight.t(), s.w3.weight.t(), s.w2.weight.t()) for m, s in enumerate(seeds)})
    x = torch.randn(21, 8, dtype=torch.float64)
    expected = torch.where(MODALITY.unsqueeze(1) == 0, seeds[0](x), seeds[1](x))
    torch.testing.assert_close(layer(x, info_of()).hidden, expected)
    torch.testing.assert_close(layer.eval()(x, info_of()).hidden, expected)
    assert check_causality(lambda states: layer.train()(states, info_of()), x[None]).is_causal, "nothing is chosen"
    assert layer.router.auxiliary_loss(x, info_of())[0] == 0
    with pytest.raises(ValueError, match="a seed for each modality"):
        layer.upcycle({0: (torch.zeros(8, 12),) * 3})


def test_auxiliary_routers_learn_the_membership_and_move_nothing_else():
    layer = build()
    frozen = {name: tensor.clone() for name, tensor in layer.state_dict().items() if "auxiliary" not in name}
    optimizer = torch.optim.AdamW(layer.router.auxiliary.parameters(), lr=0.02)
    modality = torch.arange(512) % 2
    x = torch.randn(512, 8)
    accuracies = []
    for _ in range(150):
        optimizer.zero_grad()
        loss, accuracy = layer.router.auxiliary_loss(x, info_of(modality))
        loss.backward()
        optimizer.step()
        accuracies.append(accuracy)
    assert layer.router.weight_ED.grad is None
    assert accuracies[-1] > 0.9 > accuracies[0]
    state = layer.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in frozen.items())
    chosen, predicted = layer.router(x, info_of(modality)), layer.eval().router(x, info_of(modality))
    shared = set(zip(*map(torch.Tensor.tolist, (chosen.token_N, chosen.expert_N)), strict=True)) & set(
        zip(*map(torch.Tensor.tolist, (predicted.token_N, predicted.expert_N)), strict=True)
    )
    assert len(shared) > 0.8 * chosen.token_N.numel()


def test_the_choice_of_an_expert_that_is_alone_is_not_predicted():
    torch.manual_seed(0)
    layer, x = ModalityConfig(width=8, hidden_width=12, group_sizes=(3, 1)).build(), torch.randn(21, 8)
    loss, accuracy = layer.router.auxiliary_loss(x, info_of())
    logits = layer.router.auxiliary(x)[:13, :3]
    chosen = layer.router(x, info_of())
    target = torch.zeros(21, 4)
    target[chosen.token_N, chosen.expert_N] = 1
    expected = torch.nn.functional.binary_cross_entropy_with_logits(logits, target[:13, :3])
    torch.testing.assert_close(loss, expected)
    assert float(accuracy) == pytest.approx(float(((logits > 0) == target[:13, :3].bool()).float().mean()))
    alone = chosen.expert_N == 3
    assert torch.equal(chosen.token_N[alone], torch.arange(13, 21))
    assert torch.equal(chosen.weight_N[alone], torch.ones(8))


def test_prediction_losses_of_bf16_logits_are_computed_in_fp32():
    logits = (4 * torch.randn(2000)).to(torch.bfloat16)
    target = torch.rand(2000) < 0.25
    loss, accuracy = prediction_loss(logits, target)
    assert (loss.dtype, accuracy.dtype) == (torch.float32, torch.float32)
    exact = torch.nn.functional.binary_cross_entropy_with_logits(logits.double(), target.double())
    assert float(loss) == pytest.approx(float(exact), rel=1e-5)


def test_noise_is_for_training_only():
    layer, x = build(is_noisy=True, inference="expert_choice"), torch.randn(21, 8)
    first, second = (layer.router(x, info_of()).token_N for _ in range(2))
    assert not torch.equal(first, second)
    layer.eval()
    plain = copy.deepcopy(layer)
    plain.router.is_noisy = False
    assert torch.equal(layer(x, info_of()).hidden, plain(x, info_of()).hidden)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"group_sizes": ()}, "number of modalities: got 0"),
        ({"group_sizes": (2, 0)}, "experts of a modality: got 0"),
        ({"group_sizes": (2, 2), "inference": "oracle"}, "expert_choice, auxiliary"),
    ],
)
def test_bad_groups_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        ModalityConfig(width=8, hidden_width=8, **options).build()
