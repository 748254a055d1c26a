"""Whole runs with expert layers under DeepSpeed: killed, and continued by other engines and numbers of processes."""

import deepspeed_ready  # noqa: F401
import pytest
from engine_runs import KILLED, PEER_LOST, by_deepspeed, by_torch, dying_after, same_curve
from training_runs import last_checkpoint, log, outcome, run, run_group

from btm.config_ffn import FfnConfig
from btm.model.causal_lm import build_model
from btm.model.demix import freeze_except
from btm.model.sparse_lm import add_experts
from btm.train.ranks import Ranks
from btm.train.start import _engine_of
from btm.train.torch_engine import TorchEngine

pytestmark = pytest.mark.distributed
KINDS = {
    "top_k": FfnConfig(layer="top_k", num_experts=4, load_balance_weight=0.1),
    "base": FfnConfig(layer="base", num_experts=4, layers="spread_1"),
    "demix": FfnConfig(layer="demix", initial="random"),
}
SHORT = {"last_update": 8, "total_updates": 8, "checkpoint_every": 2, "eval_every": 8, "log_every": 1, "eps": 1e-4}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_goes_on_with_other_engines_and_shares_of_the_experts(make_spec, kind):
    """Passes, steps of idle experts and running prices go with it."""
    changes = SHORT | {"ffn": KINDS[kind], "micro_batch_sequences": 2}
    reference, spec = make_spec("reference", **changes), make_spec(**changes)
    assert run(reference) == 0, log(reference)
    attempts = [
        (by_torch(spec, 2, expert_parallel=2), 2),
        (by_deepspeed(spec, 2, 2, expert_parallel=2), 4),
        (by_deepspeed(spec, 1, 2), 6),
    ]
    for number, (attempt, update) in enumerate(attempts):
        codes = run_group(attempt, 2, before=dying_after(update), attempt=number)
        assert codes == [KILLED, PEER_LOST], log(spec)
        assert last_checkpoint(spec) == update
    assert run(by_torch(spec, 1)) == 0, log(spec)
    same_curve(spec, reference)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "stage", "engine"),
    [("top_k", 2, {"expert_parallel": 2}), ("demix", 1, {"expert_parallel": 2, "dtype": "bf16"}), ("base", 2, {})],
)
def test_a_killed_run_ends_with_the_bits_of_the_run_that_was_not(make_spec, kind, stage, engine):
    changes = SHORT | {"ffn": KINDS[kind]}
    reference, spec = (by_deepspeed(make_spec(name, **changes), stage, 2, **engine) for name in ("reference", "seed"))
    assert run_group(reference, 2) == [0, 0], log(reference)
    assert run_group(spec, 2, before=dying_after(4)) == [KILLED, PEER_LOST], log(spec)
    assert run_group(spec, 2, attempt=1) == [0, 0], log(spec)
    assert outcome(spec) == outcome(reference)


def test_models_with_frozen_weights_train_on_the_torch_engine(make_spec):
    """The experts of a new domain, or auxiliary routers alone: there is hardly any state to share out."""
    spec = by_deepspeed(make_spec(ffn=KINDS["demix"]), 2, 1)
    model = build_model(spec.model, vocab_size=61, eos_id=0, seed=1)
    add_experts(model, spec.ffn, ["ants", "bees"], seed=1, is_pretrained=False)
    freeze_except(model, "bees")
    assert type(_engine_of(model, spec, Ranks(), None)) is TorchEngine
