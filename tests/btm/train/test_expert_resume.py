"""L5: runs with divided experts leave whole checkpoints and models, and continue on any number of processes."""

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from training_runs import (
    die_behind_checkpoint,
    log,
    only,
    outcome,
    rows,
    run,
    run_group,
    step_dir,
)

from btm.config_ffn import FfnConfig
from btm.model.causal_lm import load_model
from btm.train.expert_passes import keeps_passes

pytestmark = pytest.mark.distributed
KINDS = {
    "top_k": FfnConfig(layer="top_k", num_experts=4, capacity_factor=1.0),
    "global": FfnConfig(layer="top_k", num_experts=4, balance="global"),
    "base": FfnConfig(layer="base", num_experts=4, layers="spread_1"),
    "demix": FfnConfig(layer="demix", initial="random"),
    "modality": FfnConfig(layer="modality", group_sizes=[2, 2], modality_starts=[130]),
}
RECIPE = {"last_update": 6, "total_updates": 6, "checkpoint_every": 3, "eval_every": 6, "log_every": 1, "eps": 1e-4}


def run_on(spec, *, attempt: int = 0) -> None:
    count = spec.engine.num_processes
    assert (run_group(spec, count, attempt=attempt) if count > 1 else [run(spec)]) == [0] * count, log(spec)


def continued(whole, num_processes: int, expert_parallel: int):
    """What a run becomes when it is stopped after update 3 and goes on with other processes."""
    layout = {"num_processes": num_processes, "expert_parallel": expert_parallel}
    output = f"{whole.output_dir}-on-{num_processes}-{expert_parallel}"
    shutil.copytree(whole.output_dir, output)
    spec = whole.model_copy(update={"output_dir": output, "engine": whole.engine.model_copy(update=layout)})
    (Path(output) / "result.json").unlink()
    shutil.rmtree(Path(output) / "model")
    shutil.rmtree(step_dir(spec, 6))
    run_on(spec, attempt=10 * num_processes + expert_parallel)
    return spec


def assert_same_run(spec, whole) -> None:
    for ours, reference in zip(rows(spec), rows(whole), strict=True):
        assert ours.keys() == reference.keys()
        for key, value in reference.items():
            assert ours[key] == pytest.approx(value, rel=1e-4), (key, ours["update"])
    for file in (step_dir(spec, 6) / "model.safetensors", Path(spec.output_dir) / "model" / "model.safetensors"):
        ours, reference = (load_file(str(file).replace(spec.output_dir, run.output_dir)) for run in (spec, whole))
        assert ours.keys() == reference.keys()
        for name, tensor in reference.items():
            torch.testing.assert_close(ours[name], tensor, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize(
    ("kind", "layouts"),
    [
        ("top_k", [(1, 1), (2, 2)]),
        ("base", [(1, 1)]),
        *(pytest.param(kind, [(1, 1), (2, 1), (2, 2), (4, 4)], marks=pytest.mark.slow) for kind in KINDS),
    ],
)
def test_l5_a_run_of_four_processes_continues_on_others(make_spec, kind, layouts):
    """Passes of a fourth of the batch stay what they are, also where nobody asked for them again."""
    whole = make_spec("whole", ffn=KINDS[kind], num_processes=4, expert_parallel=2, **RECIPE)
    run_on(whole)
    for layout in layouts:
        spec = continued(whole, *layout)
        assert_same_run(spec, whole)
        state = json.loads((step_dir(spec, 6) / "state.json").read_text())
        assert state["progress"]["passes"] == ([2, 2, 2, 2] if keeps_passes(whole.ffn) else [])
    model = load_model(Path(whole.output_dir) / "model", domain="ants" if kind == "demix" else None)
    assert all(buffer.any() for name, buffer in model.named_buffers() if name.endswith("price_E"))
    assert model(input_ids=torch.tensor([[1, 2, 3]])).logits.isfinite().all()


@pytest.mark.slow
def test_l5_a_run_of_one_process_continues_on_four_with_a_warning_where_its_pass_cannot_be_shared(make_spec):
    whole = make_spec("whole", ffn=KINDS["base"], **RECIPE)
    run_on(whole)
    spec = continued(whole, 4, 2)
    assert_same_run(spec, whole)
    assert "1 forward passes per update, which 4 processes cannot share equally" in log(spec)
    assert "train.micro_batch_sequences=2" in log(spec)


@pytest.mark.slow
def test_bf16_experts_travel_and_the_saved_model_is_whole(make_spec):
    spec = make_spec("bf16", ffn=KINDS["top_k"], num_processes=2, expert_parallel=2, dtype="bf16", **RECIPE)
    run_on(spec)
    masters = load_file(step_dir(spec, 6) / "model.safetensors")
    saved = load_file(Path(spec.output_dir) / "model" / "model.safetensors")
    assert saved.keys() == masters.keys()
    for name, tensor in saved.items():
        assert torch.equal(tensor, masters[name].bfloat16()), name


def test_l7_a_lost_process_of_an_expert_group_is_told_apart_from_an_error_of_the_user(make_spec):
    spec = make_spec("lost", ffn=KINDS["top_k"], num_processes=2, expert_parallel=2, last_update=20, total_updates=20)
    assert run_group(spec, 2, before=only(1, lambda: die_behind_checkpoint(spec))) == [75, -signal.SIGKILL], log(spec)


@pytest.mark.slow
def test_b2_a_killed_group_with_divided_experts_ends_with_the_same_bits(make_spec):
    long = {"ffn": KINDS["top_k"], "num_processes": 2, "expert_parallel": 2, "last_update": 60, "total_updates": 60}
    plain, killed = make_spec("plain", checkpoint_every=4, **long), make_spec("killed", checkpoint_every=4, **long)
    run_on(plain)
    codes = run_group(killed, 2, before=only(1, lambda: die_behind_checkpoint(killed)))
    assert codes == [75, -signal.SIGKILL], log(killed)
    assert run_group(killed, 2, attempt=1) == [0, 0]
    assert outcome(killed) == outcome(plain)


def test_processes_that_do_not_divide_are_refused_before_training(make_spec):
    spec = make_spec("odd", ffn=KINDS["top_k"], num_processes=1, expert_parallel=2)
    assert run(spec) == 1
    assert "engine.expert_parallel (2) must divide the number of processes, which is 1" in log(spec)
    assert not os.path.exists(step_dir(spec, 5))
