"""Fixtures of the model tests."""

import pytest
import torch

from btm.config_model import ModelConfig
from btm.model import native
from btm.model.causal_lm import build_model

VOCAB_SIZE = 300


@pytest.fixture(params=["native", "torch"])
def path(request, monkeypatch):
    """Run a test once with the compiled functions and once with torch alone."""
    if request.param == "native" and native.kernels() is None:
        pytest.skip("no C++ compiler here")
    if request.param == "torch":
        monkeypatch.setattr(native, "kernels", lambda: None)
    return request.param


@pytest.fixture
def make_model():
    """Build a tiny model; keyword arguments are those of ModelConfig."""

    def make(arch: str = "llama", seed: int = 0, **sizes):
        settings = {"num_layers": 2, "hidden_size": 32, "num_heads": 4, "num_kv_heads": 2, "max_positions": 256}
        config = ModelConfig(arch=arch, **{**settings, **sizes})
        return build_model(config, vocab_size=VOCAB_SIZE, eos_id=0, seed=seed)

    return make


@pytest.fixture
def tokens():
    """Inputs and targets [3, 70] with some targets ignored."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(0, VOCAB_SIZE, (3, 71), generator=generator)
    targets = ids[:, 1:].clone()
    targets[1, 40:] = -100
    return ids[:, :-1].contiguous(), targets


@pytest.fixture
def segments():
    """Document numbers [3, 70]."""
    numbers = torch.zeros(3, 70, dtype=torch.int32)
    numbers[0, 9:] = 1
    numbers[0, 50:] = 2
    numbers[1, 64:] = 5
    return numbers
