"""Perplexity of documents, and ensembles opened from directories."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from btm.config_ensemble import EnsembleConfig
from btm.corpus.tokenizer import TextEncoder, train_tokenizer
from btm.ensemble.causal_lm import EnsembleForCausalLM, load_ensemble
from btm.ensemble.posterior import UpdatingPrior, log_uniform_prior, log_weights, mixture
from btm.errors import BtmError, EnsembleError
from btm.model.causal_lm import save_model

TEXT = "It was the best of times, it was the worst of times. " * 4
NAMES = ("law", "code", "news")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("elms")
    train_tokenizer([TEXT] * 5, folder / "tokenizer", vocab_size=280)
    encoder = TextEncoder(folder / "tokenizer")
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    for seed, name in enumerate(NAMES):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(LlamaConfig(vocab_size=encoder.vocab_size, eos_token_id=encoder.eos_id, **sizes))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(8)
        save_model(model, folder / name, torch.float32, folder / "tokenizer")
    return folder


def opened(folder: Path, *, prior=None, sequence_length=32, **values) -> EnsembleForCausalLM:
    config = EnsembleConfig.model_validate(values)
    directories = [(name, folder / name) for name in NAMES]
    return load_ensemble(directories, config=config, prior=prior, sequence_length=sequence_length)


def documents(number: int = 4) -> list[list[int]]:
    generator = np.random.default_rng(0)
    return [[*generator.integers(1, 250, 20 + 17 * index).tolist(), 0] for index in range(number)]


def member_scores(ensemble, document) -> torch.Tensor:
    """Each ELM's log-probabilities, window by window, the plain way."""
    ids = torch.tensor([ensemble.eos_id, *document])
    rows = []
    for elm in ensemble.elms:
        parts = []
        for start in range(0, len(document), ensemble.sequence_length):
            window = ids[start : start + ensemble.sequence_length + 1]
            with torch.no_grad():
                logp = torch.log_softmax(elm(window[None, :-1]).logits[0].float(), -1)
            parts.append(logp.gather(-1, window[1:, None])[:, 0])
        rows.append(torch.cat(parts))
    return torch.stack(rows)


def test_p4_one_posterior_reads_all_windows_of_a_long_document(folder) -> None:
    ensemble = opened(folder)
    assert len(documents()[-1]) > 2 * ensemble.sequence_length
    for document, given in zip(documents(), ensemble.document_log_likelihoods(documents()), strict=True):
        logp = member_scores(ensemble, document)
        assert torch.allclose(given, mixture(logp, log_weights(logp, log_uniform_prior(3))), atol=1e-4)
        total = torch.logsumexp(logp.double().sum(1) - math.log(3), 0)
        assert math.isclose(given.sum().item(), total.item(), rel_tol=1e-5)


def test_perplexity_of_texts_is_that_of_their_tokens(folder) -> None:
    ensemble = opened(folder)
    ids = TextEncoder(folder / "tokenizer").encode([TEXT, TEXT[:40]])
    from_tokens = ensemble.perplexity([document.tolist() for document in ids])
    assert ensemble.perplexity([TEXT, TEXT[:40]]) == from_tokens
    nats = -torch.cat(ensemble.document_log_likelihoods([document.tolist() for document in ids])).mean()
    assert math.isclose(from_tokens, math.exp(nats))


def test_text_that_spells_the_end_of_text_token_is_text(folder) -> None:
    ensemble = opened(folder)
    token = ensemble.text_tokenizer.eos_token
    expected = TextEncoder(folder / "tokenizer").encode([f"a{token}b"])[0].tolist()
    assert ensemble.perplexity([f"a{token}b"]) == ensemble.perplexity([expected])


def test_p6_perplexity_is_the_loss_of_the_causal_lm(folder) -> None:
    ensemble = opened(folder, sequence_length=200)
    document = documents()[-1]
    ids = torch.tensor([[ensemble.eos_id, *document]])
    assert math.isclose(ensemble.perplexity([document]), math.exp(ensemble(ids, labels=ids).loss), rel_tol=1e-4)


def test_the_updating_prior_follows_the_documents(folder) -> None:
    plain = opened(folder)
    many = documents(3) * 5
    updating = load_ensemble(
        [(name, folder / name) for name in NAMES],
        config=EnsembleConfig.model_validate({"prior": "updating"}),
        sequence_length=32,
    )
    follower = UpdatingPrior(3)
    for document, given in zip(many, updating.document_log_likelihoods(many), strict=True):
        logp = member_scores(plain, document)
        assert torch.allclose(given, mixture(logp, log_weights(logp, follower.log_prior)), atol=1e-4)
        follower.observe(logp)
    assert not torch.allclose(follower.log_prior, log_uniform_prior(3), atol=1e-3)


def test_top_k_of_a_cached_prior_loads_only_those_elms(folder, tmp_path) -> None:
    directories = [("law", folder / "law"), ("missing", tmp_path / "gone"), ("news", folder / "news")]
    prior = {"law": 0.5, "missing": 0.1, "news": 0.4}
    config = EnsembleConfig.model_validate({"top_k": 2})
    ensemble = load_ensemble(directories, config=config, prior=prior, sequence_length=32)
    assert ensemble.names == ["law", "news"]
    pair = load_ensemble(
        [directories[0], directories[2]],
        config=EnsembleConfig.model_validate({}),
        prior={"law": 5, "news": 4},
        sequence_length=32,
    )
    assert math.isclose(ensemble.perplexity(documents()), pair.perplexity(documents()), rel_tol=1e-9)
    with pytest.raises(BtmError, match="gone"):
        load_ensemble(directories, config=config)


def test_p9_top_k_of_documents_keeps_the_largest_posteriors(folder) -> None:
    ensemble = opened(folder, top_k=2)
    for document, given in zip(documents(), ensemble.document_log_likelihoods(documents()), strict=True):
        logp = member_scores(ensemble, document)
        expected = mixture(logp, log_weights(logp, log_uniform_prior(3), top_k=2))
        assert torch.allclose(given, expected, atol=1e-4)


def test_texts_are_continued_greedily(folder) -> None:
    ensemble = opened(folder)
    text = ensemble.continue_text("It was", max_new_tokens=5)
    assert text.startswith("It was")
    assert text == ensemble.continue_text("It was", max_new_tokens=5)
    prompt = torch.tensor([[ensemble.eos_id, *ensemble.text_tokenizer("It was")["input_ids"]]])
    out = ensemble.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=5, do_sample=False)
    assert text == ensemble.text_tokenizer.decode(out[0, 1:], skip_special_tokens=True)


def test_the_stored_type_is_the_type_in_memory(folder, tmp_path) -> None:
    model = opened(folder).elms[0]
    save_model(model, tmp_path / "half", torch.bfloat16, folder / "tokenizer")
    ensemble = load_ensemble([("half", tmp_path / "half")], config=EnsembleConfig.model_validate({}))
    assert ensemble.dtype == torch.bfloat16
    ids = torch.randint(1, 250, (2, 10))
    assert ensemble(ids).logits.dtype == torch.float32
    assert ensemble.sequence_length == 2048
    moved = opened(folder).to(torch.bfloat16)
    assert torch.allclose(moved(ids).logits.exp().sum(-1), torch.ones(2, 10), atol=1e-5)


def test_what_cannot_be_scored_is_named(folder) -> None:
    ensemble = opened(folder)
    with pytest.raises(EnsembleError, match="at least one token"):
        ensemble.perplexity([])
    ensemble.tokenizer = None
    with pytest.raises(EnsembleError, match="need a tokenizer"):
        ensemble.perplexity(["text"])
    ensemble.config.eos_token_id = None
    with pytest.raises(EnsembleError, match="no end-of-text token"):
        ensemble.perplexity([[1, 2]])
    with pytest.raises(EnsembleError, match="at least one ELM"):
        load_ensemble([], config=EnsembleConfig.model_validate({}))


def plain_attention(ensemble) -> list[str]:
    """Attention of each ELM; none of its modules may be patched."""
    for elm in ensemble.elms:
        assert not [module for module in elm.modules() if "forward" in module.__dict__]
    return [elm.config._attn_implementation for elm in ensemble.elms]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scoring_runs_on_the_fast_paths_and_gives_the_plain_numbers(folder, monkeypatch, dtype) -> None:
    """Every window of every ELM is read by patched modules, and nothing of it is left afterwards."""
    from btm.ensemble import likelihood

    patched, score = [], likelihood.token_losses

    def watched(model, inputs, targets, **more):
        patched.append(sum("forward" in module.__dict__ for module in model.modules()))
        return score(model, inputs, targets, **more)

    monkeypatch.setattr(likelihood, "token_losses", watched)
    ensemble = opened(folder).to(dtype)
    before = plain_attention(ensemble)
    fast = torch.cat(ensemble.document_log_likelihoods(documents(12)))
    assert patched
    assert min(patched) == 5, "attention, MLP and three norms of each ELM"
    assert plain_attention(ensemble) == before == ["sdpa"] * 3
    monkeypatch.setattr(likelihood, "prepare_for_training", lambda model, device: Unprepared())
    patched.clear()
    plain = torch.cat(ensemble.document_log_likelihoods(documents(12)))
    assert not any(patched)
    exact = torch.cat(opened(folder).document_log_likelihoods(documents(12)))
    # What bf16 costs without the fast paths; these models have sharp distributions, which makes it much.
    usual = 0.0 if dtype == torch.float32 else float((plain - exact).norm())
    error = float((fast - exact).norm())
    print(f"{dtype}: error {error:.3g}, without the fast paths {float((plain - exact).norm()):.3g}")
    assert error <= 1.5 * usual + 1e-5 * float(exact.norm())


class Unprepared:
    """What the plain forwards leave to undo."""

    def undo(self) -> None:
        """Nothing."""


def test_generation_after_scoring_is_generation_before_it(folder) -> None:
    ensemble = opened(folder)
    options = {"max_new_tokens": 12, "min_new_tokens": 12, "output_logits": True, "return_dict_in_generate": True}
    prompt = torch.tensor([documents(1)[0][:9]])

    def generated():
        return ensemble.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False, **options)

    before = generated()
    ensemble.document_log_likelihoods(documents())
    after = generated()
    assert torch.equal(before.sequences, after.sequences)
    assert all(torch.equal(one, two) for one, two in zip(before.logits, after.logits, strict=True))


def test_a_failure_in_scoring_leaves_the_elms_as_they_were(folder) -> None:
    ensemble = opened(folder)
    before = plain_attention(ensemble)
    with pytest.raises(ValueError, match="different vocabularies"):
        ensemble.document_log_likelihoods([[1, 2, 100_000]])
    assert plain_attention(ensemble) == before
