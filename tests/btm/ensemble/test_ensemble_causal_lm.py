"""An ensemble is an ordinary causal LM: P1-P10 on whole models, and transformers' generate.

Mixing the outputs of models, with generation, instead of their weights is what arcee-ai/mergekit#106 asks for.
"""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.cache_utils import DynamicCache

from btm.config_ensemble import EnsembleConfig, PosteriorMode
from btm.ensemble import causal_lm
from btm.ensemble.causal_lm import EnsembleForCausalLM
from btm.ensemble.posterior import log_uniform_prior, log_weights, mixture
from btm.errors import EnsembleError

VOCAB = 41
PRIOR = {"a": 0.6, "b": 0.3, "c": 0.1}


def llama(seed: int, vocab_size: int = VOCAB) -> PreTrainedModel:
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(
            LlamaConfig(vocab_size=vocab_size, bos_token_id=0, eos_token_id=0, pad_token_id=0, **sizes)
        )
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(10)  # Models at their initial scale all give the same flat distribution.
    return model.eval()


@pytest.fixture(scope="module")
def models() -> list[PreTrainedModel]:
    torch.set_num_threads(1)
    return [llama(seed) for seed in (1, 2, 3)]


def config(**values) -> EnsembleConfig:
    return EnsembleConfig.model_validate(values)


def tokens(batch_size: int = 2, length: int = 12, *, seed: int = 0) -> torch.Tensor:
    return torch.randint(1, VOCAB, (batch_size, length), generator=torch.Generator().manual_seed(seed))


def member_logp(models, ids) -> torch.Tensor:
    """Every ELM's next-token log-probabilities: ELMs x batch x tokens x vocabulary, the slow and obvious way."""
    with torch.no_grad():
        return torch.stack([torch.log_softmax(model(ids).logits.float(), -1) for model in models])


def reference(models, ids, log_prior, **options) -> torch.Tensor:
    """Mixture of all positions from the tensor that the ensemble must never hold."""
    logp = member_logp(models, ids)
    given = logp[:, :, :-1].gather(-1, ids[:, 1:].expand(len(models), -1, -1)[..., None])[..., 0]
    padded = torch.cat([given, torch.zeros_like(given[..., :1])], -1)
    log_w = log_weights(padded, log_prior, **options)
    return torch.logsumexp(log_w[..., None] + logp.double(), 0)


@pytest.mark.parametrize("mode", [PosteriorMode.history, PosteriorMode.fixed])
@pytest.mark.parametrize("prior", [None, PRIOR])
def test_logits_are_the_log_probabilities_of_the_mixture(models, mode, prior) -> None:
    """P1, P2: the distribution sums to 1 at every position and begins with the prior."""
    ensemble = EnsembleForCausalLM(models, names="abc", prior=prior, ensemble=config(posterior=mode, temper=0.5))
    ids = tokens()
    logits = ensemble(ids).logits
    log_prior = log_uniform_prior(3) if prior is None else torch.tensor(list(prior.values())).double().log()
    assert logits.dtype == torch.float32
    assert torch.allclose(logits.exp().sum(-1), torch.ones(2, 12), atol=1e-5)
    assert torch.allclose(logits.double(), reference(models, ids, log_prior, mode=mode, temper=0.5), atol=1e-5)


def test_last_token_mode_is_equal_weights_first_and_one_token_later(models) -> None:
    ensemble = EnsembleForCausalLM(
        models, names="abc", prior=PRIOR, ensemble=config(posterior=PosteriorMode.last_token)
    )
    ids = tokens()
    log_prior = torch.tensor(list(PRIOR.values())).double().log()
    expected = reference(models, ids, log_prior, mode=PosteriorMode.last_token)
    assert torch.allclose(ensemble(ids).logits.double(), expected, atol=1e-5)


def test_p3_identical_elms_are_the_elm(models) -> None:
    ensemble = EnsembleForCausalLM([models[0]] * 3)
    expected = member_logp(models[:1], tokens())[0]
    assert torch.allclose(ensemble(tokens()).logits, expected, atol=1e-5)


def test_p4_sequence_likelihood_telescopes_through_the_model(models) -> None:
    ids = tokens(3, 40)
    logits = EnsembleForCausalLM(models)(ids).logits.double()
    total = logits[:, :-1].gather(-1, ids[:, 1:, None]).sum((1, 2))
    each = member_logp(models, ids).double()[:, :, :-1].gather(-1, ids[:, 1:].expand(3, -1, -1)[..., None])
    assert torch.allclose(total, torch.logsumexp(each.sum((2, 3)) - math.log(3), 0), atol=1e-3)


@pytest.mark.parametrize("mode", list(PosteriorMode))
@pytest.mark.parametrize("prior", [None, PRIOR])
def test_p6_reading_in_pieces_with_the_cache_is_reading_at_once(models, mode, prior) -> None:
    ensemble = EnsembleForCausalLM(models, names="abc", prior=prior, ensemble=config(posterior=mode))
    ids = tokens(2, 20)
    full = ensemble(ids).logits
    state, parts = None, []
    for piece in ids.split([7, 1, 1, 5, 1, 1, 1, 1, 1, 1], 1):
        output = ensemble(piece, past_key_values=state, use_cache=True)
        state = output.past_key_values
        parts.append(output.logits)
    assert torch.allclose(torch.cat(parts, 1), full, atol=1e-4)
    assert torch.allclose(ensemble(ids, logits_to_keep=1).logits, full[:, -1:], atol=1e-5)
    at_once = ensemble(ids).past_key_values
    assert torch.allclose(ensemble.posterior(state), ensemble.posterior(at_once), atol=1e-5)


def test_p6_long_prompts_are_read_in_pieces(models, monkeypatch) -> None:
    ensemble = EnsembleForCausalLM(models)
    ids = tokens(2, 30)
    full = ensemble(ids).logits
    monkeypatch.setattr(causal_lm, "PIECE_TOKENS", 14)
    assert torch.allclose(ensemble(ids).logits, full, atol=1e-4)
    assert torch.allclose(ensemble(ids, logits_to_keep=1).logits, full[:, -1:], atol=1e-4)


@pytest.mark.parametrize("top_k", [None, 2])
def test_p6_generated_scores_are_those_of_a_full_reading(models, top_k) -> None:
    ensemble = EnsembleForCausalLM(models, names="abc", prior=PRIOR, ensemble=config(top_k=top_k))
    prompt = tokens(2, 6)
    output = ensemble.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=8,
        min_new_tokens=8,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    full = ensemble(output.sequences).logits[:, 5:-1]
    assert torch.allclose(torch.stack(output.logits, 1), full, atol=1e-4)


def test_p7_a_later_token_does_not_change_earlier_logits(models) -> None:
    ensemble = EnsembleForCausalLM(models, ensemble=config(top_k=2))
    ids, edited = tokens(), tokens()
    edited[:, 8] = (edited[:, 8] + 1) % VOCAB
    before, after = ensemble(ids).logits, ensemble(edited).logits
    assert torch.allclose(before[:, :8], after[:, :8], atol=1e-6)
    assert not torch.allclose(before[:, 8:], after[:, 8:], atol=1e-3)


def test_p8_the_order_of_elms_does_not_matter(models) -> None:
    one = EnsembleForCausalLM(models, names="abc", prior=PRIOR)
    other = EnsembleForCausalLM(models[::-1], names="cba", prior=PRIOR)
    assert torch.allclose(one(tokens()).logits, other(tokens()).logits, atol=1e-5)


def test_p9_top_k_of_all_is_all_and_fewer_follow_the_weights(models) -> None:
    ids = tokens(2, 30)
    full = EnsembleForCausalLM(models)(ids).logits
    assert torch.equal(EnsembleForCausalLM(models, ensemble=config(top_k=3))(ids).logits, full)
    two = EnsembleForCausalLM(models, ensemble=config(top_k=2))(ids).logits
    assert torch.allclose(two.double(), reference(models, ids, log_uniform_prior(3), top_k=2), atol=1e-5)
    assert torch.allclose(
        EnsembleForCausalLM(models, ensemble=config(top_k=2))(ids, logits_to_keep=1).logits, two[:, -1:], atol=1e-5
    )


def test_p10_one_elm_is_itself_bit_for_bit(models) -> None:
    ids = tokens()
    expected = torch.log_softmax(models[1](ids).logits.float(), -1)
    assert torch.equal(EnsembleForCausalLM([models[1]])(ids).logits, expected)


def test_an_elm_with_prior_zero_is_not_even_kept(models) -> None:
    """B4: an ensemble with a removed ELM is the ensemble built without it."""
    muted = EnsembleForCausalLM(models, names="abc", prior={"a": 0.5, "c": 0.5})
    without = EnsembleForCausalLM([models[0], models[2]])
    assert muted.names == ["a", "c"]
    assert torch.equal(muted(tokens()).logits, without(tokens()).logits)


def test_a_prior_that_is_not_uniform_chooses_the_elms_in_memory(models) -> None:
    ensemble = EnsembleForCausalLM(models, names="abc", prior={"a": 0.2, "b": 0.1, "c": 0.7}, ensemble=config(top_k=2))
    assert ensemble.names == ["a", "c"]
    assert len(ensemble.elms) == 2


def test_equal_priors_leave_the_choice_to_the_posterior(models) -> None:
    ensemble = EnsembleForCausalLM(models, names="abc", prior={"a": 1, "c": 1}, ensemble=config(top_k=1))
    assert ensemble.names == ["a", "c"]
    fixed = EnsembleForCausalLM(
        models, names="abc", prior={"a": 1, "c": 1}, ensemble=config(top_k=1, posterior=PosteriorMode.fixed)
    )
    assert fixed.names == ["a"]


def test_after_the_prompt_each_sequence_reads_with_its_own_top_k(models) -> None:
    ensemble = EnsembleForCausalLM(models, ensemble=config(top_k=1))
    rows = 6
    prompt = tokens(rows, 10)
    state = ensemble(prompt, logits_to_keep=1).past_key_values
    best = ensemble.posterior(EnsembleForCausalLM(models)(prompt).past_key_values).argmax(0)
    assert len(set(best.tolist())) > 1
    assert torch.equal(state.active.int().argmax(0), best)
    calls = []
    hooks = [
        elm.register_forward_pre_hook(lambda _, __, named: calls.append(len(named["input_ids"])), with_kwargs=True)
        for elm in ensemble.elms
    ]
    next_tokens = tokens(rows, 1, seed=5)
    logits = ensemble(next_tokens, past_key_values=state).logits
    for hook in hooks:
        hook.remove()
    assert sum(calls) == rows
    alone = member_logp(models, torch.cat([prompt, next_tokens], 1))[:, :, -1]
    assert torch.allclose(logits[:, 0], alone[best, torch.arange(rows)], atol=1e-4)


@pytest.mark.parametrize("top_k", [None, 1, 2])
def test_left_padded_rows_give_what_they_give_alone(models, top_k) -> None:
    ensemble = EnsembleForCausalLM(models, ensemble=config(top_k=top_k))
    prompts = [tokens(1, 4, seed=1), tokens(1, 9, seed=2), tokens(1, 6, seed=3)]
    width = max(prompt.shape[1] for prompt in prompts)
    batch = torch.cat([torch.nn.functional.pad(prompt, (width - prompt.shape[1], 0)) for prompt in prompts])
    mask = torch.cat([torch.nn.functional.pad(torch.ones_like(p), (width - p.shape[1], 0)) for p in prompts])
    options = {"max_new_tokens": 10, "min_new_tokens": 10, "do_sample": False}
    together = ensemble.generate(batch, attention_mask=mask, **options)
    for row, prompt in enumerate(prompts):
        alone = ensemble.generate(prompt, attention_mask=torch.ones_like(prompt), **options)
        assert torch.equal(together[row, width:], alone[0, prompt.shape[1] :])


def test_generate_greedy_is_the_argmax_chain(models) -> None:
    ensemble = EnsembleForCausalLM(models)
    ids = tokens(1, 5)
    out = ensemble.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, min_new_tokens=6, do_sample=False
    )
    for _ in range(6):
        scores = ensemble(ids).logits[:, -1]
        scores[:, 0] = -math.inf
        ids = torch.cat([ids, scores.argmax(-1, keepdim=True)], 1)
    assert torch.equal(out, ids)


@pytest.mark.parametrize("top_k", [None, 2])
def test_beam_search_with_and_without_the_cache_agree(models, top_k) -> None:
    ensemble = EnsembleForCausalLM(models, names="abc", prior=PRIOR, ensemble=config(top_k=top_k))
    ids = tokens(6, 5)
    options = {"attention_mask": torch.ones_like(ids), "num_beams": 5, "max_new_tokens": 9, "min_new_tokens": 9}
    cached = ensemble.generate(ids, **options)
    assert torch.equal(cached, ensemble.generate(ids, use_cache=False, **options))
    assert not torch.equal(cached, ensemble.generate(ids, **options | {"num_beams": 1}, do_sample=False))


def test_beams_keep_the_elms_that_their_prompt_chose(models) -> None:
    ensemble = EnsembleForCausalLM(models, ensemble=config(top_k=1))
    ids = tokens(6, 10)
    state = ensemble(ids, logits_to_keep=1).past_key_values
    rows = torch.tensor([5, 0, 0, 3, 1, 4])
    expected = [ensemble(ids[[row]], logits_to_keep=1).past_key_values for row in rows.tolist()]
    state.reorder_cache(rows)
    after = ensemble(tokens(6, 1, seed=9), past_key_values=state).logits
    for row, alone in enumerate(expected):
        single = ensemble(tokens(6, 1, seed=9)[[row]], past_key_values=alone).logits
        assert torch.allclose(after[row], single[0], atol=1e-4)


def test_sampling_repeats_with_the_seed_and_returns_several_sequences(models) -> None:
    ensemble = EnsembleForCausalLM(models)
    ids = tokens(2, 5)
    options = {
        "attention_mask": torch.ones_like(ids),
        "max_new_tokens": 12,
        "do_sample": True,
        "num_return_sequences": 3,
    }
    torch.manual_seed(0)
    first = ensemble.generate(ids, **options)
    torch.manual_seed(0)
    assert torch.equal(first, ensemble.generate(ids, **options))
    assert first.shape[0] == 6


def test_models_of_another_architecture_may_join(models) -> None:
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, n_embd=16, n_layer=1, n_head=2, n_positions=64)).eval()
    ensemble = EnsembleForCausalLM([models[0], gpt2])
    ids = tokens()
    assert torch.allclose(
        ensemble(ids).logits.double(), reference([models[0], gpt2], ids, log_uniform_prior(2)), atol=1e-5
    )
    assert ensemble.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=3).shape[1] <= 15


def test_labels_give_the_mean_loss_of_the_mixture(models) -> None:
    ids = tokens(2, 10)
    labels = ids.clone()
    labels[0, :5] = -100
    output = EnsembleForCausalLM(models)(ids, labels=labels)
    each = member_logp(models, ids)[:, :, :-1].gather(-1, ids[:, 1:].expand(3, -1, -1)[..., None])[..., 0]
    log_w = log_weights(each, log_uniform_prior(3))
    nats = -mixture(each, log_w)
    assert torch.allclose(output.loss.double(), nats[labels[:, 1:] != -100].mean(), atol=1e-5)


class LargestTensor(TorchDispatchMode):
    """Notes the most elements that any operation returns."""

    largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.largest = max(self.largest, result.numel())
        return result


def test_nothing_of_the_size_elms_by_tokens_by_vocabulary_is_made() -> None:
    def largest(number: int) -> int:
        ensemble = EnsembleForCausalLM([llama(seed) for seed in range(number)])
        with LargestTensor() as mode:
            ensemble(tokens(1, 128))
        return mode.largest

    assert largest(6) == largest(2)


def test_wrong_ensembles_are_refused(models) -> None:
    with pytest.raises(EnsembleError, match="at least one model"):
        EnsembleForCausalLM([])
    with pytest.raises(EnsembleError, match="'0' has 41 entries, '1' has 50"):
        EnsembleForCausalLM([models[0], llama(0, 50)])
    with pytest.raises(EnsembleError, match="distinct name"):
        EnsembleForCausalLM(models, names="aab")
    with pytest.raises(EnsembleError, match="not in the ensemble"):
        EnsembleForCausalLM(models, names="abc", prior={"d": 1.0})
    cache = DynamicCache(config=models[0].config)
    models[0](tokens(), past_key_values=cache)
    with pytest.raises(EnsembleError, match="filled DynamicCache"):
        EnsembleForCausalLM(models)(tokens(), past_key_values=cache)
