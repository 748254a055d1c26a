"""Scoring in passes of the size of training, for experts that choose among all tokens of a pass."""

import numpy as np
import pytest
import torch

from btm.config_ffn import FfnConfig
from btm.config_model import ModelConfig
from btm.corpus.windows import document_windows
from btm.ensemble.likelihood import TokenDocuments, _passes, token_log_likelihoods
from btm.model.causal_lm import build_model
from btm.model.expert_pass import ExpertPass
from btm.model.learning_routers import route_as_in_training
from btm.model.loss import IGNORED, token_losses
from btm.model.sparse_lm import add_experts

LENGTHS = [5, 17, 9, 30, 2, 11, 24, 8, 8, 13]


def windows_of(lengths):
    generator = np.random.default_rng(0)
    documents = TokenDocuments([generator.integers(1, 60, size=length).tolist() for length in lengths])
    return document_windows(documents, sequence_length=16, eos_id=0)


@pytest.mark.parametrize("pass_tokens", [1, 20, 40, 1000])
def test_every_window_is_in_one_pass_and_passes_are_of_one_size(pass_tokens):
    lengths = windows_of(LENGTHS).lengths
    passes = _passes(lengths, 4, pass_tokens)
    assert sorted(np.concatenate(passes).tolist()) == list(range(len(lengths)))
    sizes = [int(lengths[part].sum()) for part in passes]
    if pass_tokens > 1:
        assert len(sizes) == max(1, round(sum(sizes) / pass_tokens))
        assert max(sizes) - min(sizes) <= 2 * 16
    assert [part.tolist() for part in passes] == [part.tolist() for part in _passes(lengths, 4, pass_tokens)]


def test_experts_choose_among_the_real_tokens_of_the_pass():
    model = build_model(ModelConfig(num_layers=2, hidden_size=32, num_heads=2), vocab_size=60, eos_id=0, seed=1)
    add_experts(model, FfnConfig(layer="modality", group_sizes=[3, 2], modality_starts=[30]), ["d"], seed=4)
    route_as_in_training(model.eval())
    windows = windows_of(LENGTHS)
    # In the order of the pass, because equal states (the first of each document) are chosen among by their place.
    (order,) = _passes(windows.lengths, 2, 10_000)
    inputs, targets = torch.from_numpy(windows.inputs[order]), torch.from_numpy(windows.targets[order])
    losses = np.zeros(windows.targets.shape, dtype=np.float32)
    losses[order] = token_losses(model, inputs, targets, experts=ExpertPass(is_real=targets != IGNORED)).numpy()
    expected = -losses[windows.targets != IGNORED]
    whole = token_log_likelihoods(model, windows, batch_sequences=2, pass_tokens=10_000)
    np.testing.assert_allclose(whole, expected, atol=1e-4)
    parts = token_log_likelihoods(model, windows, batch_sequences=2)
    assert abs(parts - expected).max() > 1e-2, "among fewer tokens others are chosen"
