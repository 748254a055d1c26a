"""Whole Megatron runs: killed and continued, also by other layouts and engines; from and to Hugging Face models."""

import random
import time
from pathlib import Path

import megatron_ready  # noqa: F401
import pytest
import torch
from engine_runs import KILLED, PEER_LOST, by_megatron, by_torch, dying_after, same_curve
from training_runs import kill, last_checkpoint, log, outcome, run, run_group, start_group, wait, wait_for
from transformers import AutoModelForCausalLM

from btm.config_model import ModelConfig
from btm.corpus.tokenizer import TextEncoder
from btm.model.causal_lm import build_model, save_model
from btm.requests import Start

pytestmark = pytest.mark.distributed


@pytest.mark.slow
def test_a_run_goes_on_with_other_layouts_and_engines(make_spec):
    reference, spec = make_spec("reference"), make_spec()
    assert run(reference) == 0
    attempts = [(by_torch(spec, 1), 5), (by_megatron(spec, 2, 4), 10), (by_torch(spec, 2), 15)]
    for number, (attempt, update) in enumerate(attempts):
        world = attempt.engine.num_processes
        codes = [wait(pid) for pid in start_group(attempt, world, before=dying_after(update), attempt=number)]
        assert codes == [KILLED, *[PEER_LOST] * (world - 1)], log(spec)
        assert last_checkpoint(spec) == update
    last = by_megatron(spec, 2, 2, sequence_parallel=True)
    assert run_group(last, 2, attempt=9) == [0, 0], log(spec)
    same_curve(spec, reference)


LAYOUTS = [
    pytest.param(2, 2, {}, id="tensor"),
    pytest.param(2, 4, {"dtype": "bf16"}, id="tensor-data-bf16"),
    pytest.param(2, 2, {"sequence_parallel": True}, id="sequence"),
    pytest.param(1, 2, {"dtype": "bf16"}, id="data-bf16"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("tensor", "world", "engine"), LAYOUTS)
def test_a_killed_run_ends_with_the_bits_of_the_run_that_was_not(make_spec, tensor, world, engine):
    reference, spec = (by_megatron(make_spec(name), tensor, world, **engine) for name in ("reference", "seed"))
    assert run_group(reference, world) == [0] * world, log(reference)
    codes = [wait(pid) for pid in start_group(spec, world, before=dying_after(10))]
    assert codes == [KILLED, *[PEER_LOST] * (world - 1)], log(spec)
    assert run_group(spec, world, attempt=1) == [0] * world, log(spec)
    assert outcome(spec) == outcome(reference)


@pytest.mark.slow
@pytest.mark.parametrize(("tensor", "world"), [(2, 2), (2, 4)])
def test_kills_of_any_rank_at_random_moments_change_nothing(make_spec, tensor, world):
    changes = {"last_update": 120, "total_updates": 120, "checkpoint_every": 3}
    reference, spec = (by_megatron(make_spec(name, **changes), tensor, world) for name in ("reference", "seed"))
    assert run_group(reference, world) == [0] * world, log(reference)
    generator = random.Random(world)
    for attempt, victim in enumerate((1, 0, world - 1, 0)):
        before = last_checkpoint(spec)
        pids = start_group(spec, world, attempt=attempt)
        wait_for(lambda before=before: last_checkpoint(spec) > before)
        time.sleep(generator.uniform(0.0, 0.05))
        assert kill(pids.pop(victim)) == KILLED
        assert [wait(pid) for pid in pids] == [PEER_LOST] * (world - 1), log(spec)
    assert run_group(spec, world, attempt=9) == [0] * world, log(spec)
    assert outcome(spec) == outcome(reference)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arch", "extra"), [("llama", {}), ("qwen3", {"head_dim": 24}), ("olmo2", {}), ("qwen2", {}), ("mistral", {})]
)
def test_a_hugging_face_model_trains_here_and_loads_there(make_spec, tmp_path, corpus, arch, extra):
    """Half of a forest by one engine, half by another: both begin with one model and end with the same."""
    encoder = TextEncoder(corpus / "tokenizer")
    sizes = ModelConfig(arch=arch, num_layers=2, hidden_size=32, num_heads=4, num_kv_heads=2, extra=extra)
    model = build_model(sizes, vocab_size=encoder.vocab_size + 1, eos_id=encoder.eos_id, seed=5)
    save_model(model, tmp_path / "given", torch.float32, corpus / "tokenizer")
    weights = {"start": Start(kind="weights", path=str(tmp_path / "given")), "last_update": 8, "clip_norm": 0.5}
    reference, spec = (make_spec(name, **weights) for name in ("by-torch", "by-megatron"))
    spec = by_megatron(spec, 2, 2)
    assert run(reference) == 0, log(reference)
    assert run_group(spec, 2) == [0, 0], log(spec)
    same_curve(spec, reference)
    folder, right_folder = (Path(one.output_dir) / "model" for one in (spec, reference))
    assert sorted(path.name for path in folder.iterdir()) == sorted(path.name for path in right_folder.iterdir())
    assert (folder / "config.json").read_text() == (right_folder / "config.json").read_text()
    trained, right = (AutoModelForCausalLM.from_pretrained(path).eval() for path in (folder, right_folder))
    tokens = torch.arange(16)[None]
    with torch.no_grad():
        logits, right_logits, given = (one(tokens).logits for one in (trained, right, model.eval()))
    assert (logits - right_logits).abs().max() < 5e-4  # of 2; AdamW divides by small numbers at first
    assert (logits - given).abs().max() > 1e-1
