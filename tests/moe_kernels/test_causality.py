"""The causality checker passes what is causal and fails what is not."""

import pytest
import torch

from moe_kernels import BaseConfig, DemixConfig, LayerOutput, ModalityConfig, TokenInfo, TopKConfig, check_causality

X = torch.randn(2, 12, 8, generator=torch.Generator().manual_seed(0))
INFO = TokenInfo(
    domain_T=torch.arange(2).repeat_interleave(12), modality_T=torch.arange(24) % 2, token_id_T=torch.arange(24)
)
TOP_K = {"width": 8, "hidden_width": 8, "num_experts": 4}
MODALITY = {"width": 8, "hidden_width": 8, "group_sizes": (2, 2)}


def run(config, *, is_training):
    torch.manual_seed(0)
    layer = config.build().train(is_training)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return check_causality(lambda x: layer(x, INFO), X)


@pytest.mark.parametrize(
    ("config", "is_training"),
    [
        (BaseConfig(**TOP_K), False),
        (DemixConfig(width=8, hidden_width=8, num_domains=2), True),
        (DemixConfig(width=8, hidden_width=8, num_domains=2), False),
        (TopKConfig(**TOP_K), True),
        (TopKConfig(**TOP_K), False),
        (TopKConfig(**TOP_K, router="switch"), True),
        (TopKConfig(**TOP_K, router="hash"), True),
        (ModalityConfig(**MODALITY), False),
    ],
)
def test_causal_layers_pass(config, is_training):
    report = run(config, is_training=is_training)
    assert report.is_causal, report
    assert report.position is None


@pytest.mark.parametrize(
    ("config", "is_training"),
    [
        (TopKConfig(**TOP_K, router="expert_choice"), True),
        (TopKConfig(**TOP_K, router="expert_choice"), False),
        (BaseConfig(**TOP_K), True),
        (ModalityConfig(**MODALITY), True),
        (ModalityConfig(**MODALITY, inference="expert_choice"), False),
    ],
)
def test_layers_that_look_ahead_fail(config, is_training):
    report = run(config, is_training=is_training)
    assert not report.is_causal
    assert report.largest_change > 1e-3
    assert 0 <= report.position < 11


def test_models_over_token_ids():
    embedding = torch.nn.Embedding(9, 8)
    ids = torch.randint(9, (2, 7), generator=torch.Generator().manual_seed(1))
    assert check_causality(lambda i: embedding(i).cumsum(1), ids, num_ids=9).is_causal
    assert not check_causality(lambda i: embedding(i).flip(1).cumsum(1).flip(1), ids, num_ids=9).is_causal


def test_a_leak_between_sequences_and_a_nan_are_found():
    assert not check_causality(lambda x: x + x[:, -1:].sum(0), X).is_causal
    assert not check_causality(lambda x: x / (x[:, -1:] - x[:, -1:]), X).is_causal


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: check_causality(lambda x: x, X[:, :1]), "S > 1"),
        (lambda: check_causality(lambda x: x, torch.zeros(1, 4, dtype=torch.int64)), "vocabulary size"),
        (lambda: check_causality(lambda x: x[:, :3], X), "wrap it in a lambda"),
        (lambda: check_causality(lambda x: x, X, num_trials=0), "num_trials: got 0"),
    ],
)
def test_bad_input_is_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_layer_outputs_are_understood():
    layer = TopKConfig(**TOP_K).build()
    assert isinstance(layer(X), LayerOutput)
    assert check_causality(layer, X).is_causal
