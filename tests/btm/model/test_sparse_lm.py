"""Sparse models: what layers are put where, what they start from, what survives saving, and one pass per forward."""

import copy
import json

import pytest
import torch

from btm.config_ffn import FfnConfig
from btm.errors import CheckpointError, ConfigError
from btm.model.causal_lm import flops_per_token, load_model, save_model
from btm.model.expert_block import expert_modules
from btm.model.expert_pass import EXPERTS, ExpertPass, ExpertPassError
from btm.model.loss import loss_sum, token_losses
from btm.model.patches import prepare_for_training
from btm.model.sparse_lm import add_experts, sparsity_of
from moe_kernels import check_causality

VOCAB_SIZE = 300
LAYERS = {
    "top_k": FfnConfig(layer="top_k", num_experts=4),
    "shared": FfnConfig(layer="top_k", num_experts=4, shared_hidden_width=32, balance="global"),
    "demix": FfnConfig(layer="demix"),
    "base": FfnConfig(layer="base", layers="spread_1", num_experts=4),
    "modality": FfnConfig(layer="modality", group_sizes=[2, 2], modality_starts=[200]),
    "depths": FfnConfig(layer="modality", group_sizes=[2, 2], modality_starts=[200], depth_fraction=0.5),
}
WEIGHTS = {"load_balance": 0.5, "z": 0.1, "auxiliary": 0.2, "depth_auxiliary": 0.2}
ARCHITECTURES = ["llama", "mistral", "qwen2", "qwen3", "olmo2", "smollm3"]


@pytest.fixture
def make_sparse(make_model):
    def make(kind: str, arch: str = "llama", *, is_pretrained: bool = False, **sizes):
        model = make_model(arch, **sizes)
        return add_experts(model, LAYERS[kind], ["ants", "bees"], seed=5, is_pretrained=is_pretrained)

    return make


@pytest.fixture
def ids():
    return torch.randint(0, VOCAB_SIZE, (3, 20), generator=torch.Generator().manual_seed(1))


def labels(**fields) -> ExpertPass:
    return ExpertPass(domain=torch.tensor([0, 1, 1]), **fields)


def logits(model, ids, experts: ExpertPass | None = None) -> torch.Tensor:
    return model(input_ids=ids, use_cache=False, **{EXPERTS: experts or labels()}).logits


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("kind", LAYERS)
def test_a_saved_model_comes_back_with_the_same_logits(make_sparse, ids, tmp_path, arch, kind):
    model = make_sparse(kind, arch).eval()
    save_model(model, tmp_path / "model", torch.float32)
    loaded = load_model(tmp_path / "model")
    assert sparsity_of(loaded) == sparsity_of(model)
    assert not loaded.training
    assert torch.equal(logits(loaded, ids), logits(model, ids))
    save_model(loaded, tmp_path / "again", torch.float32)
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "model" / name).read_bytes()


def test_transformers_alone_refuses_a_sparse_directory_instead_of_inventing_weights(make_sparse, tmp_path):
    from transformers import AutoModelForCausalLM

    save_model(make_sparse("top_k"), tmp_path / "model", torch.float32)
    with pytest.raises(ValueError, match="btm_sparse"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "model")


@pytest.mark.parametrize("damage", ["missing_tensor", "description", "truncated"])
def test_damaged_sparse_directories_are_refused(make_sparse, tmp_path, damage):
    from safetensors.torch import load_file, save_file

    path = tmp_path / "model"
    save_model(make_sparse("demix"), path, torch.float32)
    weights, config = path / "model.safetensors", path / "config.json"
    if damage == "missing_tensor":
        tensors = load_file(weights)
        del tensors["model.layers.0.mlp.layer.experts.experts.1.up_proj.weight"]
        save_file(tensors, weights)
    elif damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
    else:
        config.write_text(json.dumps(json.loads(config.read_text()) | {"btm": {"ffn": {"layer": "sparse"}}}))
    with pytest.raises(CheckpointError, match="restore"):
        load_model(path)


@pytest.mark.parametrize("kind", [kind for kind in LAYERS if kind != "depths"])
def test_a_token_costs_the_flops_of_the_dense_model(make_model, make_sparse, kind):
    sizes = {"hidden_size": 256, "num_layers": 4}
    dense, sparse = make_model(**sizes), make_sparse(kind, **sizes)
    ratio = flops_per_token(sparse, 64) / flops_per_token(dense, 64)
    # Routers come on top, and for modality the auxiliary ones.
    assert 0.999 <= ratio <= (1.05 if kind == "modality" else 1.01)
    assert sum(p.numel() for p in sparse.parameters()) > 1.2 * sum(p.numel() for p in dense.parameters())


def test_tokens_that_skip_layers_cost_less(make_sparse):
    sizes = {"hidden_size": 256, "num_layers": 4}
    all_pass, half = (flops_per_token(make_sparse(kind, **sizes), 64) for kind in ("modality", "depths"))
    # Two of four blocks let half of the tokens pass their feed-forward networks of 3 x 256 x 704 weights.
    assert all_pass - half == pytest.approx(6 * 2 * 0.5 * 3 * 256 * 704, rel=0.2)


@pytest.mark.parametrize(
    ("ffn", "is_exact"),
    [
        (FfnConfig(layer="demix"), True),
        (FfnConfig(layer="base", layers="spread_1", num_experts=3), True),
        (FfnConfig(layer="top_k", num_experts=4, hidden_width=96), True),
        (FfnConfig(layer="top_k", num_experts=4, router="switch", hidden_width=96), False),
    ],
)
def test_upcycling_starts_from_what_the_dense_model_computes(make_model, ids, ffn, is_exact):
    dense = make_model()
    sparse = add_experts(copy.deepcopy(dense), ffn, ["ants", "bees"], seed=5, is_pretrained=True)
    ours, reference = logits(sparse, ids), dense(input_ids=ids).logits
    assert (ours - reference).abs().max() < 1e-5 if is_exact else (ours - reference).abs().max() > 1e-4


def test_random_experts_depend_on_the_seed_and_the_block_alone(make_model):
    def build(seed: int, blocks: list[int]):
        ffn = FfnConfig(layer="top_k", num_experts=4, layers=blocks)
        return add_experts(make_model(), ffn, seed=seed).state_dict()

    name = "model.layers.1.mlp.layer.experts.w1_EDF"
    torch.manual_seed(1)
    both = build(5, [0, 1])
    torch.manual_seed(2)
    assert torch.equal(both[name], build(5, [1])[name])
    assert not torch.equal(both[name], build(6, [1])[name])
    assert not torch.equal(both[name], both[name.replace("1", "0", 1)])
    assert not torch.equal(both[name][0], both[name][1])


@pytest.mark.parametrize("kind", LAYERS)
def test_activation_checkpointing_changes_no_loss_and_no_gradient(make_sparse, ids, kind):
    results = []
    for is_checkpointed in (False, True):
        model = make_sparse(kind).train()
        if is_checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        experts = labels()
        loss = loss_sum(model, ids, ids, experts=experts)
        extra = experts.loss(WEIGHTS)
        (loss if extra is None else loss + extra).backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        results.append((loss.detach(), extra, gradients, experts.reports))
    (loss, extra, gradients, reports), (other_loss, other_extra, other_gradients, other_reports) = results
    assert torch.equal(loss, other_loss)
    assert extra is None or torch.equal(extra, other_extra)
    assert gradients.keys() == other_gradients.keys()
    assert gradients
    for name, gradient in gradients.items():
        torch.testing.assert_close(other_gradients[name], gradient, rtol=1e-5, atol=1e-7, msg=name)
    for block, report in reports.items():
        assert torch.equal(other_reports[block].statistics.counts_E, report.statistics.counts_E)


def test_reentrant_checkpointing_is_refused_rather_than_dropping_auxiliary_losses(make_sparse, ids):
    model = make_sparse("top_k").train()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    model.enable_input_require_grads()
    with pytest.raises(ExpertPassError, match="use_reentrant"):
        loss_sum(model, ids, ids, experts=labels()).backward()


def test_auxiliary_losses_reach_every_router_once(make_sparse, ids):
    model = make_sparse("top_k").train()
    single, twice = [], []
    for weight, gradients in ((1.0, single), (2.0, twice)):
        model.zero_grad()
        experts = labels()
        logits(model, ids, experts)
        assert len(experts.reports) == len(expert_modules(model)) == 2
        loss = experts.loss({"load_balance": weight})
        assert loss is not None
        loss.backward()
        gradients += [module.layer.router.weight_ED.grad.clone() for module in expert_modules(model)]
    for one, two in zip(single, twice, strict=True):
        assert one.abs().max() > 0
        torch.testing.assert_close(two, 2 * one)


def test_a_pass_serves_one_forward_and_calls_may_follow_each_other(make_sparse, ids):
    model = make_sparse("demix").eval()
    experts = labels()
    first = logits(model, ids, experts)
    assert torch.equal(logits(model, ids), first)
    assert torch.equal(copy.deepcopy(model)(input_ids=ids, **{EXPERTS: labels()}).logits, first)
    with pytest.raises(ExpertPassError, match="one forward"):
        logits(model, ids, experts)
    with pytest.raises(ExpertPassError, match="domain"):
        model(input_ids=ids)
    with pytest.raises(ExpertPassError, match="one id for each of 3"):
        logits(model, ids, ExpertPass(domain=torch.tensor([0])))


@pytest.mark.parametrize("kind", ["top_k", "shared", "base", "modality", "depths"])
def test_generation_with_a_cache_gives_what_it_gives_without(make_sparse, ids, kind):
    model = make_sparse(kind).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    options = {"max_new_tokens": 10, "do_sample": False, "attention_mask": torch.ones_like(ids), "eos_token_id": None}
    cached, plain = (model.generate(ids, use_cache=use_cache, **options) for use_cache in (True, False))
    assert torch.equal(cached, plain)
    assert cached.shape == (3, 30)


def test_padding_is_taken_from_the_mask_of_transformers(make_sparse, ids):
    model = make_sparse("top_k").eval()
    mask = torch.ones_like(ids)
    mask[1, 12:] = 0
    seen = []
    for module in expert_modules(model):
        module.layer.register_forward_hook(lambda m, args, out: seen.append(out.statistics.num_tokens))
    model(input_ids=ids, attention_mask=mask)
    assert seen == [ids.numel() - 8] * 2


@pytest.mark.parametrize(
    ("kind", "is_causal"),
    [("top_k", True), ("base", True), ("modality", True), ("depths", True), ("base", False), ("modality", False)],
)
def test_models_are_causal_at_inference(make_sparse, ids, kind, is_causal):
    """A whole model: BASE and expert choice look at the batch in training, nothing does at inference."""
    model = make_sparse(kind)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.train(not is_causal)
    report = check_causality(lambda tokens: model(input_ids=tokens), ids, num_ids=VOCAB_SIZE)
    assert report.is_causal == is_causal


def test_the_fast_paths_compute_the_same(make_sparse, ids):
    model = make_sparse("demix").eval()
    reference = token_losses(model, ids, ids, experts=labels())
    prepared = prepare_for_training(model)
    assert prepared.patched
    torch.testing.assert_close(token_losses(model, ids, ids, experts=labels()), reference, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("arch", "ffn", "words"),
    [
        ("gpt2", FfnConfig(layer="top_k"), "SwiGLU"),
        ("gemma", FfnConfig(layer="top_k"), "SwiGLU"),
        ("llama", FfnConfig(layer="top_k", layers=[0, 7]), "beyond the 2"),
        ("llama", FfnConfig(layer="base", layers="spread_3"), "3 blocks apart"),
        ("llama", FfnConfig(layer="top_k", shared_hidden_width=96), "leaves no width"),
        ("llama", FfnConfig(layer="demix", hidden_width=48), "model.intermediate_size"),
        ("llama", FfnConfig(layer="top_k", hidden_width=1000, initial="copy"), "wider"),
    ],
)
def test_what_cannot_be_is_refused_with_a_remedy(make_model, arch, ffn, words):
    with pytest.raises(ConfigError, match=words):
        add_experts(make_model(arch), ffn, ["ants"], seed=0)


def test_experts_are_added_once_and_domains_differ(make_sparse, make_model):
    with pytest.raises(ConfigError, match="already"):
        add_experts(make_sparse("top_k"), LAYERS["base"], seed=0)
    with pytest.raises(ConfigError, match="different domains"):
        add_experts(make_model(), LAYERS["demix"], ["ants", "ants"], seed=0)
