import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP, LlamaRMSNorm

from btm.model.causal_lm import load_model, save_model
from btm.model.loss import loss_sum, token_losses
from btm.model.patches import ATTENTION_NAME, prepare_for_training

ARCHITECTURES = ["llama", "mistral", "qwen2", "qwen3", "gpt2", "gpt_neox", "olmo2", "gemma", "phi3"]


def _loss_and_gradients(model, *batch):
    model.zero_grad()
    loss = loss_sum(model, *batch)
    loss.backward()
    return loss.detach(), [parameter.grad.float().clone() for parameter in model.parameters()]


def _assert_close(results, expected, relative):
    torch.testing.assert_close(results[0], expected[0], rtol=relative, atol=0)
    for mine, theirs in zip(results[1], expected[1], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=relative * 10 * float(theirs.abs().max() + 1e-3))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_a_prepared_model_computes_the_same(make_model, tokens, segments, path, arch, packed):
    model = make_model(arch)
    batch = (*tokens, segments) if packed else tokens
    expected = _loss_and_gradients(model, *batch)
    prepared = prepare_for_training(model)
    assert model.config._attn_implementation == ATTENTION_NAME
    results = _loss_and_gradients(model, *batch)
    _assert_close(results, expected, 1e-5)
    prepared.undo()
    assert model.config._attn_implementation == "sdpa"
    again = _loss_and_gradients(model, *batch)
    assert all(torch.equal(one, two) for one, two in zip(again[1], expected[1], strict=True))


def test_every_module_of_a_llama_is_patched_and_nothing_else(make_model):
    model = make_model()
    prepared = prepare_for_training(model)
    kinds = [type(module) for module in prepared.patched]
    counts = [kinds.count(kind) for kind in (LlamaAttention, LlamaMLP, LlamaRMSNorm)]
    assert counts == [2, 2, 5]
    assert len(kinds) == 9
    assert not prepare_for_training(model).patched, "a second call has nothing left to do"


def test_other_activations_stay_unpatched(make_model, tokens):
    model = make_model(extra={"hidden_act": "relu"})
    expected = _loss_and_gradients(model, *tokens)
    prepared = prepare_for_training(model)
    assert LlamaMLP not in [type(module) for module in prepared.patched]
    _assert_close(_loss_and_gradients(model, *tokens), expected, 1e-5)


@pytest.mark.parametrize("packed", [False, True])
def test_bf16_is_as_close_to_fp32_as_transformers_own_bf16(make_model, tokens, segments, path, packed):
    batch = (*tokens, segments) if packed else tokens
    exact = _loss_and_gradients(make_model(), *batch)
    plain_model = make_model()
    prepare_for_training(plain_model, "cpu", torch.bfloat16).undo()
    plain = _loss_and_gradients(plain_model, *batch)
    fast_model = make_model()
    prepare_for_training(fast_model, "cpu", torch.bfloat16)
    fast = _loss_and_gradients(fast_model, *batch)
    assert float(fast[0]) == pytest.approx(float(exact[0]), rel=1e-3)
    for mine, theirs, reference in zip(fast[1], plain[1], exact[1], strict=True):
        error, usual = (mine - reference).norm(), (theirs - reference).norm()
        assert float(error) <= 1.5 * float(usual) + 0.02 * float(reference.norm())


def test_parameters_change_type_and_buffers_do_not(make_model):
    model = make_model()
    before = list(model.parameters())
    frequencies = model.model.rotary_emb.inv_freq.clone()
    prepare_for_training(model, "cpu", torch.bfloat16)
    assert all(one is two for one, two in zip(before, model.parameters(), strict=True))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(model.model.rotary_emb.inv_freq, frequencies)


def test_generation_with_a_cache_is_the_same(make_model, tokens):
    model = make_model().eval()
    prompt = tokens[0][:, :9]
    arguments = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    expected = model.generate(prompt, **arguments)
    prepare_for_training(model)
    assert torch.equal(model.generate(prompt, **arguments), expected)


def test_padding_masks_are_respected(make_model, tokens):
    model = make_model().eval()
    inputs, mask = tokens[0].clone(), torch.ones_like(tokens[0])
    mask[0, :30] = 0
    with torch.no_grad():
        expected = model(input_ids=inputs, attention_mask=mask).logits[0, 30:]
        prepare_for_training(model)
        result = model(input_ids=inputs, attention_mask=mask).logits[0, 30:]
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-4)


def test_saved_models_know_nothing_of_it(make_model, tokens, tmp_path):
    model = make_model()
    save_model(model, tmp_path / "plain", torch.float32)
    prepare_for_training(model)
    save_model(model, tmp_path / "prepared", torch.float32)
    for file in (tmp_path / "plain").iterdir():
        assert (tmp_path / "prepared" / file.name).read_bytes() == file.read_bytes()
    loaded = load_model(tmp_path / "prepared")
    torch.testing.assert_close(token_losses(loaded, *tokens), token_losses(model.eval(), *tokens), rtol=1e-5, atol=1e-5)


def test_training_steps_are_bit_identical(make_model, tokens, segments, path):
    gradients = []
    for _ in range(2):
        model = make_model()
        prepare_for_training(model, "cpu", torch.bfloat16)
        gradients.append(_loss_and_gradients(model, *tokens, segments)[1])
    assert all(torch.equal(one, two) for one, two in zip(*gradients, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("packed", [False, True])
def test_a_gpu_computes_the_same(make_model, tokens, segments, packed):
    batch = (*tokens, segments) if packed else tokens
    expected = _loss_and_gradients(make_model(), *batch)
    model = make_model()
    prepare_for_training(model, "cuda")
    loss, gradients = _loss_and_gradients(model, *(item.cuda() for item in batch))
    _assert_close((loss.cpu(), [item.cpu() for item in gradients]), expected, 1e-3)
