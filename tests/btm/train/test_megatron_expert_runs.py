"""Whole runs with expert layers under Megatron: killed, and continued by other layouts and engines."""

import megatron_ready  # noqa: F401
import pytest
from engine_runs import KILLED, PEER_LOST, by_megatron, by_torch, dying_after, same_curve
from training_runs import last_checkpoint, log, outcome, run, run_group

from btm.config_ffn import FfnConfig
from btm.model.causal_lm import build_model
from btm.model.demix import freeze_except
from btm.model.learning_routers import freeze_except_auxiliary
from btm.model.sparse_lm import add_experts
from btm.train.ranks import Ranks
from btm.train.start import _engine_of, _passes
from btm.train.torch_engine import TorchEngine

pytestmark = pytest.mark.distributed
KINDS = {
    "top_k": FfnConfig(layer="top_k", num_experts=4, load_balance_weight=0.1),
    "base": FfnConfig(layer="base", num_experts=4, layers="spread_1"),
    "demix": FfnConfig(layer="demix", initial="random"),
    "modality": FfnConfig(layer="modality", group_sizes=[2, 2], modality_starts=[130], is_noisy=True),
}
SHORT = {"last_update": 8, "total_updates": 8, "checkpoint_every": 2, "eval_every": 8, "log_every": 1, "eps": 1e-4}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_goes_on_with_other_layouts_and_engines(make_spec, kind):
    """Passes, steps of idle experts, running prices and random numbers go with it."""
    changes = SHORT | {"ffn": KINDS[kind], "micro_batch_sequences": 2}
    reference, spec = make_spec("reference", **changes), make_spec(**changes)
    assert run(reference) == 0, log(reference)
    attempts = [
        (by_megatron(spec, 2, 2), 2),
        (by_torch(spec, 2, expert_parallel=2), 4),
        (by_megatron(spec, 2, 4, sequence_parallel=True, expert_parallel=2), 6),
    ]
    for number, (attempt, update) in enumerate(attempts):
        world = attempt.engine.num_processes
        codes = run_group(attempt, world, before=dying_after(update), attempt=number)
        assert codes == [KILLED, *[PEER_LOST] * (world - 1)], log(spec)
        assert last_checkpoint(spec) == update
    assert run(by_torch(spec, 1)) == 0, log(spec)
    same_curve(spec, reference)


@pytest.mark.parametrize(
    ("kind", "tensor", "world", "engine"),
    [
        ("modality", 2, 2, {}),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in [
                ("top_k", 2, 4, {"sequence_parallel": True}),
                ("demix", 1, 2, {"dtype": "bf16"}),
                ("base", 2, 4, {}),
                ("top_k", 2, 4, {"expert_parallel": 2}),
                ("demix", 1, 4, {"expert_parallel": 2, "dtype": "bf16"}),
            ]
        ),
    ],
)
def test_a_killed_run_ends_with_the_bits_of_the_run_that_was_not(make_spec, kind, tensor, world, engine):
    changes = SHORT | {"ffn": KINDS[kind]}
    reference, spec = (by_megatron(make_spec(name, **changes), tensor, world, **engine) for name in ("whole", "seed"))
    assert run_group(reference, world) == [0] * world, log(reference)
    codes = run_group(spec, world, before=dying_after(4))
    assert codes == [KILLED, *[PEER_LOST] * (world - 1)], log(spec)
    assert run_group(spec, world, attempt=1) == [0] * world, log(spec)
    assert outcome(spec) == outcome(reference)


def test_models_with_frozen_weights_train_on_the_torch_engine_with_passes_for_all_processes(make_spec):
    """The experts of a new domain, or auxiliary routers alone: there is hardly any state to share out."""
    for kind, freeze in (("demix", lambda model: freeze_except(model, "bees")), ("modality", freeze_except_auxiliary)):
        spec = by_megatron(make_spec(ffn=KINDS[kind]), 2, 4)
        model = build_model(spec.model, vocab_size=270, eos_id=0, seed=1)
        add_experts(model, spec.ffn, ["ants", "bees"], seed=1, is_pretrained=False)
        whole = _passes(model, spec, Ranks(0, 4), None)
        freeze(model)
        assert type(_engine_of(model, spec, Ranks(), None)) is TorchEngine
        passes = _passes(model, spec, Ranks(0, 4), None)
        assert (whole, passes) == ((None, None) if kind == "demix" else ([4, 4], [2, 2, 2, 2]))
