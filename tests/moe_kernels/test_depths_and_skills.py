"""Mixture of depths, and skill modules."""

import pytest
import torch

from moe_kernels import ModalityConfig, SkillConfig, TokenInfo, TopKConfig, check_causality
from moe_kernels.layers import MixtureOfDepths

MODALITY = torch.arange(20) % 2


def build(**options):
    torch.manual_seed(0)
    layer = ModalityConfig(width=8, hidden_width=8, group_sizes=(2, 2), inference="expert_choice").build()
    return MixtureOfDepths(layer, width=8, **options).double()


def test_keeping_all_tokens_without_a_gate_changes_nothing():
    depths, x = build(keep_fraction=1.0, is_gated=False), torch.randn(2, 10, 8, dtype=torch.float64)
    info = TokenInfo(modality_T=MODALITY)
    torch.testing.assert_close(depths(x, info).hidden, depths.layer(x, info).hidden)


@pytest.mark.parametrize("keep_fraction", [0.25, 0.6])
def test_only_the_best_tokens_pass_weighted_by_their_score(keep_fraction):
    torch.manual_seed(0)
    depths = MixtureOfDepths(
        TopKConfig(width=8, hidden_width=8, num_experts=3).build(), width=8, keep_fraction=keep_fraction
    ).double()
    x = torch.randn(20, 8, dtype=torch.float64)
    mask = torch.arange(20) != 3
    out = depths(x, TokenInfo(is_real_T=mask))
    score = torch.sigmoid(x @ depths.weight_1D[0])
    kept = torch.where(mask, score, -1).topk(-(-int(keep_fraction * 100) * 19 // 100)).indices
    expected = torch.zeros_like(x)
    expected[kept] = score[kept, None] * depths.layer(x[kept]).hidden
    torch.testing.assert_close(out.hidden, expected)
    out.hidden.square().sum().backward()
    assert float(depths.weight_1D.grad.abs().max()) > 0


def test_the_auxiliary_router_learns_and_makes_inference_causal():
    torch.manual_seed(0)
    depths = MixtureOfDepths(TopKConfig(width=8, hidden_width=8, num_experts=3).build(), width=8, keep_fraction=0.5)
    x = torch.randn(2, 64, 8)
    assert not check_causality(depths, x).is_causal
    before = depths.weight_1D.detach().clone()
    optimizer = torch.optim.AdamW(depths.auxiliary.parameters(), lr=0.02)
    for _ in range(100):
        optimizer.zero_grad()
        loss, accuracy = depths.auxiliary_loss(x)
        loss.backward()
        optimizer.step()
    assert accuracy > 0.9
    assert torch.equal(depths.weight_1D, before)
    assert depths.weight_1D.grad is None
    assert check_causality(depths.eval(), x).is_causal


def test_bad_depths_are_refused():
    for options in ({"keep_fraction": 0.0}, {"keep_fraction": 1.5}, {"inference": "none"}):
        with pytest.raises(ValueError, match="allowed"):
            build(**options)


def skill_layer():
    tasks = {"caption": ("text", "image"), "chat": ("text",)}
    return SkillConfig(width=8, hidden_width=8, skills=("text", "image", "sound"), tasks=tasks).build()


def test_a_task_runs_the_mean_of_its_skills_and_leaves_the_others_alone():
    layer, x = skill_layer(), torch.randn(6, 8)
    text, image, sound = layer.experts.experts
    task = torch.tensor([layer.task_ids["caption"]] * 2 + [layer.task_ids["chat"]] * 4)
    out = layer(x, TokenInfo(domain_T=task))
    torch.testing.assert_close(out.hidden, torch.cat([(text(x[:2]) + image(x[:2])) / 2, text(x[2:])]))
    out.hidden.sum().backward()
    assert all(parameter.grad is None for parameter in sound.parameters())
    assert all(parameter.grad is not None for parameter in image.parameters())


def test_identical_skills_are_dense_for_every_task():
    layer, x = skill_layer(), torch.randn(4, 8)
    for expert in layer.experts.experts:
        expert.load_state_dict(layer.experts.experts[0].state_dict())
    for task in layer.task_ids.values():
        hidden = layer(x, TokenInfo(domain_T=torch.full((4,), task))).hidden
        torch.testing.assert_close(hidden, layer.experts.experts[0](x))


@pytest.mark.parametrize("used", [(), ("taste",)])
def test_unknown_or_missing_skills_are_refused(used):
    with pytest.raises(ValueError, match="skills of task eat"):
        SkillConfig(width=8, hidden_width=8, skills=("text",), tasks={"eat": used}).build()
