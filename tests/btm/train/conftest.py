"""A small corpus, a tokenizer and requests of a tiny model, real in every part."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from btm.config_model import EngineConfig, ModelConfig
from btm.config_train import TrainConfig
from btm.corpus.shards import ShardWriter
from btm.corpus.tokenizer import TextEncoder, train_tokenizer
from btm.requests import Start, TokenSource, TrainSpec

SpecFactory = Callable[..., TrainSpec]


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``tokenizer/`` and ``<domain>/{train,dev}`` shards of two domains with different habits."""
    directory = tmp_path_factory.mktemp("corpus")
    train_tokenizer(["some words to learn from, and some more"], directory / "tokenizer", vocab_size=270)
    encoder = TextEncoder(directory / "tokenizer")
    for number, domain in enumerate(("ants", "bees")):
        generator = np.random.default_rng(number)
        for split, count in (("train", 40), ("dev", 6)):
            with ShardWriter(directory / domain / split, encoder.vocab_size) as writer:
                for _ in range(count):
                    steps = generator.integers(1, 4, size=generator.integers(20, 60))
                    ids = 1 + (np.cumsum(steps) + 50 * number) % (encoder.vocab_size - 1)
                    writer.add(np.append(ids, encoder.eos_id), num_bytes=2 * len(ids))
    return directory


@pytest.fixture
def make_spec(corpus: Path, tmp_path: Path) -> SpecFactory:
    """Build a request; keywords of the recipe and of the request itself are told apart by name."""

    def make(name: str = "seed", domains: tuple[str, ...] = ("ants", "bees"), **changes: Any) -> TrainSpec:
        recipe = {
            "sequence_length": 16,
            "batch_tokens": 128,
            "checkpoint_every": 5,
            "eval_every": 10,
            "eval_tokens": 100,
            "log_every": 2,
            "lr": 1e-2,
        }
        recipe |= {key: changes.pop(key) for key in list(changes) if key in TrainConfig.model_fields}
        engine = {key: changes.pop(key) for key in list(changes) if key in EngineConfig.model_fields and key != "name"}
        request = {
            "start": Start(kind="scratch"),
            "last_update": 20,
            "total_updates": 40,
            "batch_sequences": 8,
            "seed": 7,
            "dev": [TokenSource(domain=domain, prefix=str(corpus / domain / "dev")) for domain in domains],
        }
        return TrainSpec(
            name=name,
            output_dir=str(tmp_path / name),
            sources=[TokenSource(domain=domain, prefix=str(corpus / domain / "train")) for domain in domains],
            tokenizer_dir=str(corpus / "tokenizer"),
            model=ModelConfig(num_layers=1, hidden_size=32, num_heads=2, max_positions=64),
            train=TrainConfig(**recipe),
            engine=EngineConfig(**({"dtype": "fp32"} | engine)),
            **(request | changes),
        )

    return make
