"""The layers: what systems of expert layers promise, each on one process."""

import copy
import dataclasses

import pytest
import torch
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from moe_kernels import EXPERT_LAYERS, BaseConfig, DemixConfig, ModalityConfig, SkillConfig, TokenInfo, TopKConfig
from moe_kernels.experts import SwigluFfn
from moe_kernels.layers import DemixLayer, base_layer_positions, freeze_except, mix_domains

CONFIGS = {
    "base": BaseConfig(width=8, hidden_width=12, num_experts=3),
    "demix": DemixConfig(width=8, hidden_width=12, num_domains=3),
    "modality": ModalityConfig(width=8, hidden_width=12, group_sizes=(2, 1)),
    "skills": SkillConfig(width=8, hidden_width=12, skills=("a", "b", "c"), tasks={"x": ("a",), "y": "ab", "z": "c"}),
    "top_k": TopKConfig(width=8, hidden_width=12, num_experts=3, shared_hidden_width=4),
}
INFO = TokenInfo(domain_T=torch.arange(20) % 3, modality_T=torch.arange(20) % 2, token_id_T=torch.arange(20))


def randomise(module):
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return module


def test_every_entry_of_the_table_has_a_case_and_a_reference():
    assert set(CONFIGS) == set(EXPERT_LAYERS)
    for name, entry in EXPERT_LAYERS.items():
        assert isinstance(CONFIGS[name], entry.config)
        assert dataclasses.is_dataclass(entry.config)
        assert entry.reference.startswith("https://arxiv.org/abs/")


@pytest.mark.parametrize("name", EXPERT_LAYERS)
@pytest.mark.parametrize("is_training", [True, False])
def test_contract_shape_gradients_padding_and_empty_batches(name, is_training):
    torch.manual_seed(0)
    layer = randomise(CONFIGS[name].build()).train(is_training)
    x = torch.randn(2, 10, 8, requires_grad=True)
    mask = torch.arange(20) != 7
    info = dataclasses.replace(INFO, is_real_T=mask)
    out = layer(x, info)
    assert out.hidden.shape == x.shape
    assert out.statistics.num_tokens == 19
    out.hidden.square().sum().backward()
    assert torch.isfinite(x.grad).all()
    assert any(parameter.grad is not None for parameter in layer.parameters())
    other = x.detach().clone().view(20, 8)
    other[7] = 9.0
    changed = layer(other.view(2, 10, 8), info).hidden.view(20, 8)
    torch.testing.assert_close(changed[mask], out.hidden.view(20, 8)[mask].detach())
    empty = TokenInfo(**{name: torch.zeros(0, dtype=torch.int64) for name in ("domain_T", "modality_T")})
    assert layer(torch.zeros(0, 10, 8), empty).hidden.shape == (0, 10, 8)
    with pytest.raises(ValueError, match="check the model width"):
        layer(torch.zeros(2, 10, 9), info)


def test_top_k_equals_a_loop_over_tokens_with_a_shared_expert():
    torch.manual_seed(0)
    layer = TopKConfig(width=8, hidden_width=12, num_experts=5, shared_hidden_width=4).build().double()
    x = torch.randn(9, 8, dtype=torch.float64)
    experts, expected = layer.experts, []
    for state in x:
        logits = layer.router.weight_ED @ state
        best = logits.softmax(0).topk(2)
        y = layer.shared(state)
        for weight, index in zip(best.values / best.values.sum(), best.indices, strict=True):
            hidden = functional.silu(state @ experts.w1_EDF[index]) * (state @ experts.w3_EDF[index])
            y = y + weight * (hidden @ experts.w2_EFD[index])
        expected.append(y)
    torch.testing.assert_close(layer(x).hidden, torch.stack(expected))


def test_identical_experts_equal_the_dense_network_under_any_router():
    torch.manual_seed(0)
    layer = TopKConfig(width=8, hidden_width=12, num_experts=4).build()
    dense = SwigluFfn(8, 12)
    with torch.no_grad():
        layer.experts.w1_EDF.copy_(dense.w1.weight.t().expand(4, -1, -1))
        layer.experts.w3_EDF.copy_(dense.w3.weight.t().expand(4, -1, -1))
        layer.experts.w2_EFD.copy_(dense.w2.weight.t().expand(4, -1, -1))
    x = torch.randn(17, 8)
    torch.testing.assert_close(layer(x).hidden, dense(x))


def test_capacity_drops_tokens_and_says_so():
    config = TopKConfig(width=8, hidden_width=8, num_experts=4, router="switch", capacity_factor=0.5)
    statistics = config.build()(torch.randn(64, 8)).statistics
    assert statistics.num_dropped == statistics.num_unrouted >= 32
    assert statistics.dropped_fraction == statistics.num_dropped / 64
    assert statistics.counts_E.max() == 8


@pytest.mark.parametrize("num_tokens", [1, 3, 20, 21])
@pytest.mark.parametrize("num_experts", [1, 4])
def test_base_starts_as_the_identity_and_is_balanced(num_tokens, num_experts):
    layer = BaseConfig(width=8, hidden_width=12, num_experts=num_experts, num_sublayers=2).build()
    x = torch.randn(num_tokens, 8)
    out = layer(x)
    assert torch.equal(out.hidden, x)
    counts = out.statistics.counts_E
    assert counts.max() - counts.min() <= 1
    assert out.statistics.num_unrouted == out.statistics.num_dropped == 0


def test_base_formula_and_gradient_of_the_centroids():
    torch.manual_seed(0)
    layer = BaseConfig(width=8, hidden_width=12, num_experts=3).build().double()
    x = torch.randn(9, 8, dtype=torch.float64)
    layer(x).hidden.sum().backward()
    gradient_ED = layer.router.large_centroid_ED.grad
    assert float(gradient_ED.abs().max()) == 0, "f is zero at first, so only its last matrix moves"
    assert float(layer.experts.experts[0].outer[0].weight.grad.abs().max()) > 0
    randomise(layer)
    layer.zero_grad()
    routing = layer.router(x, TokenInfo())
    expected = x.clone()
    for token, expert in zip(routing.token_N.tolist(), routing.expert_N.tolist(), strict=True):
        gate = torch.sigmoid(x[token] @ layer.router.centroids()[expert])
        expected[token] = x[token] + gate * layer.experts.experts[expert](x[token : token + 1])[0]
    out = layer(x)
    torch.testing.assert_close(out.hidden, expected)
    out.hidden.sum().backward()
    assert float(layer.router.large_centroid_ED.grad.abs().min(1).values.max()) > 0


def test_l4_base_under_reentrant_checkpointing_routes_the_same():
    torch.manual_seed(0)
    layer = randomise(BaseConfig(width=8, hidden_width=12, num_experts=3).build().double())
    x = torch.randn(9, 8, dtype=torch.float64, requires_grad=True)
    gradients = []
    for function in (lambda s: layer(s).hidden, lambda s: checkpoint(lambda t: layer(t).hidden, s, use_reentrant=True)):
        layer.zero_grad()
        function(x).square().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in layer.parameters()])
    assert all(torch.equal(plain, again) for plain, again in zip(*gradients, strict=True))


def test_base_at_inference_does_not_depend_on_the_batch():
    layer = randomise(BaseConfig(width=8, hidden_width=12, num_experts=3).build().double()).eval()
    x = torch.randn(30, 8, dtype=torch.float64)
    torch.testing.assert_close(layer(x[:4]).hidden, layer(x).hidden[:4])


def test_base_layer_positions_follow_the_paper():
    assert base_layer_positions(24, 1) == [12]
    assert base_layer_positions(24, 3) == [6, 12, 18]


def test_l2_idle_demix_experts_are_not_moved_by_the_optimizer():
    torch.manual_seed(0)
    layer = DemixConfig(width=8, hidden_width=12, num_domains=3).build()
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, weight_decay=0.1)
    for domain in (1, 0):
        before = copy.deepcopy(layer.state_dict())
        optimizer.zero_grad()
        layer(torch.randn(6, 8), TokenInfo(domain_T=torch.full((6,), domain))).hidden.square().sum().backward()
        optimizer.step()
        for name, tensor in layer.state_dict().items():
            assert torch.equal(tensor, before[name]) != name.startswith(f"experts.experts.{domain}.")


def test_demix_with_one_domain_is_dense():
    layer = DemixConfig(width=8, hidden_width=12, num_domains=1).build()
    x = torch.randn(5, 8)
    info = TokenInfo(domain_T=torch.zeros(5, dtype=torch.int64))
    assert torch.equal(layer(x, info).hidden, layer.experts.experts[0](x))


class TinyModel(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = torch.nn.Embedding(11, 8)
        self.layers = torch.nn.ModuleList(
            DemixConfig(width=8, hidden_width=12, num_domains=2).build() for _ in range(2)
        )
        self.head = torch.nn.Linear(8, 11)

    def forward(self, ids, domain):
        x, info = self.embedding(ids), TokenInfo(domain_T=torch.full((ids.numel(),), domain))
        for layer in self.layers:
            x = x + layer(x, info).hidden
        return self.head(x)


def test_b4_b5_adding_a_domain_leaves_the_others_bit_identical_and_removing_is_exact():
    torch.manual_seed(0)
    model, ids = TinyModel(), torch.randint(11, (2, 6))
    old = copy.deepcopy(model.state_dict())
    logits = [model(ids, domain).detach() for domain in range(2)]
    assert {layer.add_domain(like=1) for layer in model.layers} == {2}
    assert torch.equal(model(ids, 2), logits[1])
    optimizer = torch.optim.AdamW(freeze_except(model, 2), lr=0.05, weight_decay=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        functional.cross_entropy(model(ids, 2).flatten(0, 1), ids.flatten()).backward()
        optimizer.step()
    assert all(torch.equal(tensor, old[name]) for name, tensor in model.state_dict().items() if name in old)
    assert all(torch.equal(model(ids, domain), logits[domain]) for domain in range(2))
    assert not torch.allclose(model(ids, 2), logits[1])
    added = model(ids, 2).detach()
    for layer in model.layers:
        layer.remove_domain(0)
    assert torch.equal(model(ids, 0), logits[1])
    assert torch.equal(model(ids, 1), added)


def test_demix_errors_name_the_remedy():
    layer = DemixConfig(width=8, hidden_width=12, num_domains=2).build()
    with pytest.raises(ValueError, match="domain: got 2; allowed: 0 to 1"):
        layer.add_domain(like=2)
    layer.remove_domain(0)
    with pytest.raises(ValueError, match="keep at least one domain"):
        layer.remove_domain(0)
    with pytest.raises(ValueError, match="a model with DemixLayer"):
        freeze_except(torch.nn.Linear(2, 2), 0)
    assert isinstance(layer, DemixLayer)


def test_mixing_domains_is_the_posterior_over_the_whole_history():
    torch.manual_seed(0)
    logp = torch.randn(3, 7, dtype=torch.float64) - 2
    prior = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    mixed = mix_domains(logp, prior.log())
    torch.testing.assert_close(mixed.sum(), torch.log((prior * logp.sum(1).exp()).sum()))
    alone = mix_domains(logp, torch.tensor([0.0, -torch.inf, -torch.inf], dtype=torch.float64))
    torch.testing.assert_close(alone, logp[0])
    later = logp.clone()
    later[:, 4:] = -1.0
    assert torch.equal(mix_domains(later, prior.log())[:4], mixed[:4])
