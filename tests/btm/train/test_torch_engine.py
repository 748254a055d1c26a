import copy

import numpy as np
import pytest
import torch
from torch.nn import functional

from btm.config_model import EngineConfig, ModelConfig
from btm.config_train import TrainConfig
from btm.corpus.sampler import Batch
from btm.corpus.windows import Windows
from btm.model.causal_lm import build_model, load_model
from btm.train.ranks import Ranks
from btm.train.torch_engine import TorchEngine

VOCABULARY = 97
# Large: where the true gradient is zero (biases of keys), Adam would otherwise blow rounding up to full steps.
EPS = 1e-4


def build(arch: str = "llama", **changes) -> torch.nn.Module:
    sizes = {"num_layers": 2, "hidden_size": 32, "num_heads": 2, "max_positions": 64} | changes
    return build_model(ModelConfig(arch=arch, **sizes), vocab_size=VOCABULARY, eos_id=0, seed=3)


def engine_of(model, dtype: str = "fp32", **recipe) -> TorchEngine:
    train = TrainConfig(**({"sequence_length": 12, "batch_tokens": 96, "lr": 1e-3} | recipe))
    return TorchEngine(model, train=train, config=EngineConfig(dtype=dtype), ranks=Ranks())


def batch_of(seed: int, segments: bool = False) -> Batch:
    generator = np.random.default_rng(seed)
    tokens = generator.integers(1, VOCABULARY, size=(8, 13))
    if not segments:
        return Batch(tokens, None, {"d": 96})
    numbers = np.tile(np.repeat([1, 2, 3, 0], [4, 3, 4, 2]).astype(np.int32), (8, 1))
    return Batch(tokens, numbers, {"d": 8 * 8})


def reference_steps(model, batches, rates, clip_norm: float) -> list[tuple[float, float]]:
    """The recipe written down plainly: mean loss, clipping, AdamW with decay of matrices only."""
    groups = [
        {"params": [p for p in model.parameters() if p.ndim >= 2], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=EPS, foreach=False)
    history = []
    for batch, rate in zip(batches, rates, strict=True):
        tokens = torch.from_numpy(batch.tokens)
        logits = model(input_ids=tokens[:, :-1]).logits
        loss = functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), clip_norm)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        history.append((loss.item(), norm.item()))
    return history


def steps(engine: TorchEngine, batches, rates) -> list[tuple[float, float]]:
    history = []
    for number, (batch, rate) in enumerate(zip(batches, rates, strict=True)):
        gradients = engine.gradients(batch, random_seed=number, stop_requested=False)
        engine.step(rate)
        history.append((gradients.loss, gradients.norm))
    return history


@pytest.mark.parametrize("arch", ["llama", "gpt2", "gpt_neox"])
@pytest.mark.parametrize("clip_norm", [0.3, 100.0])
def test_a_training_step_is_the_recipe_written_down_plainly(arch, clip_norm):
    model = build(arch)
    reference = copy.deepcopy(model)
    batches, rates = [batch_of(seed) for seed in range(4)], [1e-3, 2e-3, 3e-3, 1e-3]
    engine = engine_of(model, clip_norm=clip_norm, eps=EPS)
    expected = reference_steps(reference, batches, rates, clip_norm)
    np.testing.assert_allclose(steps(engine, batches, rates), expected, rtol=2e-5)
    for (name, parameter), other in zip(model.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(parameter, other, rtol=1e-4, atol=3e-6, msg=name)
    assert engine.num_optimizer_steps == 4


@pytest.mark.parametrize("segments", [False, True])
@pytest.mark.parametrize("micro_batch_sequences", [1, 3, 8])
def test_accumulation_gives_the_gradient_of_the_whole_batch(segments, micro_batch_sequences):
    whole, parts = engine_of(build()), engine_of(build(), micro_batch_sequences=micro_batch_sequences)
    results = [
        engine.gradients(batch_of(1, segments), random_seed=0, stop_requested=False) for engine in (whole, parts)
    ]
    assert results[1].loss == pytest.approx(results[0].loss, rel=1e-6)
    assert results[1].norm == pytest.approx(results[0].norm, rel=1e-5)
    torch.testing.assert_close(parts.flat.gradients, whole.flat.gradients, rtol=1e-4, atol=1e-5)


def test_bf16_micro_batches_add_up_in_fp32():
    parts = engine_of(build(), dtype="bf16", micro_batch_sequences=1)
    whole = engine_of(build(), dtype="fp32")
    for engine in (parts, whole):
        engine.gradients(batch_of(1), random_seed=0, stop_requested=False)
    error = (parts.flat.gradients - whole.flat.gradients).norm() / whole.flat.gradients.norm()
    assert error < 0.02


def test_masters_are_fp32_so_that_updates_below_bf16_resolution_add_up():
    engine = engine_of(build(), dtype="bf16", weight_decay=0.0)
    assert engine.flat.masters.dtype == torch.float32
    slot = next(slot for slot in engine.flat.slots if slot.name.endswith("norm.weight"))
    master, weight = slot.view(engine.flat.masters), slot.view(engine.flat.weights)
    assert (weight == 1).all()
    for _ in range(50):
        engine.gradients(batch_of(1), random_seed=0, stop_requested=False)
        slot.view(engine.flat.gradients).fill_(1.0)
        engine.step(1e-4)
    # Fifty steps of 1e-4 from 1.0: each is a fiftieth of what bf16 resolves there.
    torch.testing.assert_close(master, torch.full_like(master, 1 - 50e-4), rtol=0, atol=2e-5)
    assert (weight == master.bfloat16()).all()
    assert (weight < 1).all()


def test_a_parameter_without_gradient_gets_zero_and_not_the_gradient_of_before():
    engine = engine_of(build(tie_embeddings=False))
    engine.gradients(batch_of(1), random_seed=0, stop_requested=False)
    head = next(slot for slot in engine.flat.slots if slot.name == "lm_head.weight").view(engine.flat.gradients)
    assert head.abs().sum() > 0
    engine.model.lm_head.weight.requires_grad_(False)
    engine.gradients(batch_of(1), random_seed=0, stop_requested=False)
    assert head.abs().sum() == 0


def test_mean_loss_counts_targets_and_leaves_training_alone():
    engine = engine_of(build())
    inputs = np.random.default_rng(0).integers(1, VOCABULARY, size=(11, 12))
    targets = np.random.default_rng(1).integers(1, VOCABULARY, size=(11, 12))
    targets[3, 5:] = -100
    empty = np.zeros(0)
    loss = engine.dev_loss(Windows(inputs, targets, empty, empty, empty, empty, empty)).loss
    logits = engine.model(input_ids=torch.from_numpy(inputs)).logits
    expected = functional.cross_entropy(logits.flatten(0, 1), torch.from_numpy(targets).flatten())
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    assert engine.model.training


def test_random_numbers_follow_from_the_seed_of_the_update():
    losses = []
    for noise in (1, 2):
        engine = engine_of(build("gpt2", extra={"resid_pdrop": 0.2}))
        torch.manual_seed(noise)
        losses.append([engine.gradients(batch_of(1), random_seed=seed, stop_requested=False).loss for seed in (5, 6)])
    assert losses[0] == losses[1]
    assert losses[0][0] != losses[0][1]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("tie_embeddings", [True, False])
def test_the_saved_model_has_the_weights_that_were_trained(tmp_path, corpus, dtype, tie_embeddings):
    engine = engine_of(build(tie_embeddings=tie_embeddings), dtype=dtype)
    steps(engine, [batch_of(1)], [1e-2])
    masters = {name: tensor.clone() for name, tensor in engine.tensor_files()["model.safetensors"].items()}
    engine.save_model(tmp_path / "model", corpus / "tokenizer")
    loaded = load_model(tmp_path / "model", torch.float32)
    wanted = torch.bfloat16 if dtype == "bf16" else torch.float32
    assert {name for name, _ in loaded.named_parameters()} == masters.keys()
    for name, parameter in loaded.named_parameters():
        assert torch.equal(parameter, masters[name].to(wanted).float()), name
