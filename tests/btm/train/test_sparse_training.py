"""Expert layers through the trainer: scale of auxiliary losses, idle experts, processes, kills."""

import json
import re
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from training_runs import (
    die_behind_checkpoint,
    fork,
    log,
    outcome,
    rank_environments,
    rows,
    run,
    wait,
)

from btm.config_ffn import FfnConfig
from btm.config_model import EngineConfig, ModelConfig
from btm.config_train import TrainConfig
from btm.corpus.sampler import Batch, BatchSampler
from btm.corpus.tokenizer import TextEncoder
from btm.errors import DataError
from btm.model.causal_lm import build_model, load_model, save_model
from btm.model.demix import add_domain
from btm.model.expert_pass import ExpertPass
from btm.model.learning_routers import route_as_in_training
from btm.model.loss import IGNORED, loss_sum, token_losses
from btm.model.sparse_lm import add_experts
from btm.requests import Start, TokenSource
from btm.train.expert_training import loss_weights
from btm.train.progress import differences
from btm.train.ranks import Ranks, joined_ranks
from btm.train.start import _dev_windows
from btm.train.torch_engine import TorchEngine

VOCABULARY, SEQUENCES, LENGTH = 61, 6, 10
LAYERS = {
    "micro": FfnConfig(layer="top_k", num_experts=4, load_balance_weight=0.3, z_weight=0.1),
    "global": FfnConfig(layer="top_k", num_experts=4, balance="global", load_balance_weight=0.3, z_weight=0.1),
    "demix": FfnConfig(layer="demix", initial="random"),
    "base": FfnConfig(layer="base", layers="spread_1", num_experts=3),
    "modality": FfnConfig(layer="modality", group_sizes=[2, 2], modality_starts=[30]),
    "depths": FfnConfig(layer="modality", group_sizes=[2, 1], modality_starts=[30], depth_fraction=0.6),
}
SMALL_FFN = {"layer": "top_k", "num_experts": 4}


def engine_of(kind: str, ranks: Ranks | None = None, **recipe) -> TorchEngine:
    model = build_model(ModelConfig(num_layers=2, hidden_size=32, num_heads=2), vocab_size=VOCABULARY, eos_id=0, seed=1)
    add_experts(model, LAYERS[kind], ["ants", "bees", "cats"], seed=4)
    train = TrainConfig(**({"sequence_length": LENGTH, "lr": 1e-2, "clip_norm": 0.5, "eps": 1e-3} | recipe))
    return TorchEngine(model, train=train, config=EngineConfig(dtype="fp32"), ranks=ranks or Ranks())


def batch_of(seed: int, domains: tuple[int, ...] = (0, 1, 2)) -> Batch:
    tokens = np.random.default_rng(seed).integers(1, VOCABULARY, size=(SEQUENCES, LENGTH + 1))
    return Batch(tokens, None, {"d": SEQUENCES * LENGTH}, np.resize(np.array(domains), SEQUENCES))


def padded_batch(seed: int) -> Batch:
    batch = batch_of(seed)
    segments = np.ones(batch.tokens.shape, dtype=np.int32)
    segments[:, 7:] = 0
    segments[:, :3] = 2
    return Batch(batch.tokens, segments, {"d": SEQUENCES * 5}, batch.domain)


def gradients_of(engine: TorchEngine, batch: Batch):
    result = engine.gradients(batch, random_seed=0, stop_requested=False)
    return result, engine.flat.gradients.clone()


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("make_batch", [batch_of, padded_batch])
def test_the_gradient_is_that_of_mean_loss_plus_weighted_auxiliary_losses(kind, make_batch):
    engine, plain = engine_of(kind), engine_of(kind)
    batch = make_batch(0)
    result, gradients = gradients_of(engine, batch)
    model, num_targets = plain.model, sum(batch.domain_tokens.values())
    inputs, targets = torch.from_numpy(batch.inputs.copy()), torch.from_numpy(batch.targets.copy())
    segments = None if batch.input_segments is None else torch.from_numpy(batch.input_segments.copy())
    experts = ExpertPass(domain=torch.from_numpy(batch.domain), is_real=None if segments is None else segments > 0)
    mean = loss_sum(model, inputs, targets, segments, experts) / num_targets
    extra = experts.loss(loss_weights(LAYERS[kind]))
    plain.flat.start_gradients()
    (mean if extra is None else mean + extra).backward()
    plain.flat.finish_gradients()
    assert result.loss == pytest.approx(mean.item(), rel=1e-5)
    torch.testing.assert_close(gradients / num_targets, plain.flat.gradients, rtol=1e-4, atol=1e-6)
    for block, report in experts.reports.items():
        rows = engine.expert_metrics()
        assert rows[f"experts/{block}/load"] == pytest.approx(report.statistics.max_over_mean_load)
        assert rows[f"experts/{block}/entropy"] == pytest.approx(report.statistics.load_entropy)
        for name, loss in report.losses.items():
            assert rows[f"experts/{block}/{name}"] == pytest.approx(loss.item(), rel=1e-5)


def test_accumulation_weights_each_pass_by_its_tokens():
    """Micro-batches of 4 and 2 sequences: the auxiliary losses enter as two thirds and one third."""
    engine, plain = engine_of("micro", micro_batch_sequences=4), engine_of("micro")
    batch = batch_of(0)
    _, gradients = gradients_of(engine, batch)
    plain.flat.start_gradients()
    for part, share in ((slice(0, 4), 4 / 6), (slice(4, 6), 2 / 6)):
        rows = batch.part(part)
        experts = ExpertPass(domain=torch.from_numpy(rows.domain))
        inputs, targets = torch.from_numpy(rows.inputs.copy()), torch.from_numpy(rows.targets.copy())
        loss = loss_sum(plain.model, inputs, targets, experts=experts) / (SEQUENCES * LENGTH)
        (loss + share * experts.loss(loss_weights(LAYERS["micro"]))).backward()
    plain.flat.finish_gradients()
    torch.testing.assert_close(gradients / (SEQUENCES * LENGTH), plain.flat.gradients, rtol=1e-4, atol=1e-6)


def test_idle_experts_keep_weights_moments_and_step_counts():
    """L2: neither momentum nor weight decay moves an expert that no token of the update reached."""
    engine = engine_of("demix")
    for number in range(2):
        gradients_of(engine, batch_of(number))
        engine.step(1e-2)
    before = {file: {n: t.clone() for n, t in tensors.items()} for file, tensors in engine.tensor_files().items()}
    gradients_of(engine, batch_of(2, (0, 2)))
    engine.step(1e-2)
    checked = 0
    for file, tensors in engine.tensor_files().items():
        for name, tensor in tensors.items():
            is_idle = "experts.experts.1" in name
            assert torch.equal(tensor, before[file][name]) == is_idle, (file, name)
            checked += is_idle
    assert checked == 2 * (3 + 2 * 3 + 1)
    steps = {name: float(t) for name, t in engine.tensor_files()["optimizer.safetensors"].items() if "step." in name}
    assert {steps[f"step.model.layers.0.mlp.layer.experts.experts.{n}.matrices"] for n in (0, 2)} == {3.0}
    assert steps["step.model.layers.0.mlp.layer.experts.experts.1.matrices"] == 2.0
    assert engine.num_optimizer_steps == 3


def test_step_counts_of_experts_travel_with_checkpoints():
    engine, resumed = engine_of("demix"), engine_of("demix")
    for number, domains in enumerate([(0, 1, 2), (0, 2), (0, 1)]):
        gradients_of(engine, batch_of(number, domains))
        engine.step(1e-2)
    for file, tensors in resumed.tensor_files().items():
        for name, tensor in tensors.items():
            tensor.copy_(engine.tensor_files()[file][name])
    resumed.tensors_loaded(engine.num_optimizer_steps)
    for each in (engine, resumed):
        gradients_of(each, batch_of(5))
        each.step(1e-2)
    assert torch.equal(engine.flat.masters, resumed.flat.masters)


def steps_on(directory: Path, kind: str, world: int, micro: int | None, is_padded: bool) -> None:
    """Two updates on each process; leaves what each saw."""

    def work(rank: int) -> None:
        with joined_ranks() as ranks:
            engine = engine_of(kind, ranks, micro_batch_sequences=micro)
            history, gradients, metrics = [], [], []
            for number in range(2):
                result, gradient = gradients_of(engine, padded_batch(number) if is_padded else batch_of(number))
                gradients.append(gradient)
                engine.step(1e-2)
                history.append((result.loss, result.norm))
                metrics.append(list(engine.expert_metrics().values()))
            torch.save([history, gradients, engine.flat.masters.clone(), metrics], directory / f"{world}-{rank}.pt")

    pids = [
        fork(lambda rank=rank: work(rank), log=directory / "log.txt", env=env)
        for rank, env in enumerate(rank_environments(world, directory / f"rendezvous-{world}"))
    ]
    assert [wait(pid) for pid in pids] == [0] * world, (directory / "log.txt").read_text()


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("kind", "world", "micro", "single_micro"),
    [
        # Layers that look at all tokens of a pass are compared with the same passes one after the other.
        ("micro", 2, None, 3),
        ("base", 2, None, 3),
        ("modality", 2, None, 3),
        ("depths", 2, None, 3),
        ("demix", 2, None, None),
        ("demix", 4, 1, None),
        # Balanced over the whole batch: the same as one process that has it in one pass, also with unequal shares.
        ("global", 2, None, None),
        ("global", 4, None, None),
    ],
)
@pytest.mark.parametrize("is_padded", [False, True])
def test_processes_compute_what_one_process_computes(tmp_path, kind, world, micro, single_micro, is_padded):
    """L1, L6: loss, gradients, clip norm, weights and statistics."""
    steps_on(tmp_path, kind, 1, single_micro, is_padded)
    steps_on(tmp_path, kind, world, micro, is_padded)
    history, gradients, masters, metrics = torch.load(tmp_path / "1-0.pt")
    per_rank = [torch.load(tmp_path / f"{world}-{rank}.pt") for rank in range(world)]
    for other in per_rank[1:]:
        assert torch.equal(other[2], per_rank[0][2])
    np.testing.assert_allclose(per_rank[0][0], history, rtol=1e-5)
    for ours, reference in zip(per_rank[0][1], gradients, strict=True):
        assert (ours - reference).norm() <= 1e-4 * reference.norm()
    torch.testing.assert_close(per_rank[0][2], masters, rtol=0, atol=1e-5)
    np.testing.assert_allclose(per_rank[0][3], metrics, rtol=1e-4)


@pytest.mark.distributed
def test_processes_without_rows_take_part_in_global_balancing(tmp_path):
    """L7: three updates of six sequences on eight processes end, and equal one process."""
    steps_on(tmp_path, "global", 1, None, False)
    steps_on(tmp_path, "global", 8, None, False)
    torch.testing.assert_close(
        torch.load(tmp_path / "8-7.pt")[2], torch.load(tmp_path / "1-0.pt")[2], rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("kind", ["top_k", "demix", "base"])
def test_a_run_learns_reports_its_experts_and_leaves_a_sparse_model(make_spec, kind):
    spec = make_spec(kind, ffn=FfnConfig(layer=kind, layers="spread_1" if kind == "base" else "all", num_experts=4))
    assert run(spec) == 0
    trained, evaluated = (
        [row for row in rows(spec) if "train/loss" in row],
        [r for r in rows(spec) if "train/loss" not in r],
    )
    assert trained[-1]["train/loss"] < 0.9 * trained[0]["train/loss"]
    assert trained[-1]["experts/0/unrouted"] == 0
    assert trained[-1]["experts/0/load"] >= 1
    assert ("experts/0/load_balance" in trained[-1]) == (kind == "top_k")
    counts = {domain: evaluated[-1][f"eval/{domain}/experts/0"] for domain in ("ants", "bees")}
    by_class = [value for key, value in evaluated[-1].items() if re.fullmatch(r"classes/\w+/experts/0", key)]
    assert len(by_class) > 1
    assert np.sum(by_class, axis=0).tolist() == np.sum(list(counts.values()), axis=0).tolist()
    if kind == "demix":
        assert trained[-1]["experts/0/load"] == 1
        assert counts["ants"][1] == counts["bees"][0] == 0 < min(counts["ants"][0], counts["bees"][1])
    model = load_model(Path(spec.output_dir) / "model", domain="ants" if kind == "demix" else None)
    assert model(input_ids=torch.tensor([[1, 2, 3]])).logits.isfinite().all()


@pytest.mark.parametrize("ffn", [FfnConfig(layer="demix"), FfnConfig(**SMALL_FFN, balance="global")])
def test_a_killed_run_ends_with_the_same_bits(make_spec, ffn):
    long = {"ffn": ffn, "last_update": 150, "total_updates": 150, "checkpoint_every": 4}
    plain, killed = make_spec("plain", **long), make_spec("killed", **long)
    assert run(plain) == 0
    assert run(killed, before=lambda: die_behind_checkpoint(killed)) == -signal.SIGKILL
    assert run(killed) == 0
    assert outcome(killed) == outcome(plain)


def test_a_domain_joins_a_trained_model_and_nothing_else_moves(make_spec, tmp_path, corpus):
    first = make_spec("first", domains=("ants",), ffn=FfnConfig(layer="demix"))
    assert run(first) == 0
    model = load_model(Path(first.output_dir) / "model")
    add_domain(model, "bees", like="ants")
    save_model(model, tmp_path / "extended", torch.float32, corpus / "tokenizer")
    second = make_spec(
        "second",
        domains=("bees",),
        start=Start(kind="weights", path=str(tmp_path / "extended")),
        trainable_domain="bees",
        first_update=0,
    )
    assert run(second) == 0
    before, after = model.state_dict(), load_model(Path(second.output_dir) / "model").state_dict()
    changed = {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    assert changed
    assert all(".experts.experts.1." in name for name in changed)
    result = json.loads((Path(second.output_dir) / "result.json").read_text())
    assert result["dev_loss"]["bees"] < 5


def test_auxiliary_routers_learn_after_the_model_and_nothing_else_moves(make_spec):
    ffn = FfnConfig(layer="modality", group_sizes=[2, 2], modality_starts=[130], auxiliary_weight=0, depth_fraction=0.5)
    first = make_spec("first", ffn=ffn)
    assert run(first) == 0
    model = load_model(Path(first.output_dir) / "model")
    start_from = Start(kind="weights", path=str(Path(first.output_dir) / "model"))
    weighted = ffn.model_copy(update={"auxiliary_weight": 1.0})
    second = make_spec("second", ffn=weighted, start=start_from, trains_auxiliary_only=True, last_update=40)
    assert run(second) == 0
    before, after = model.state_dict(), load_model(Path(second.output_dir) / "model").state_dict()
    changed = {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    assert changed == {name for name in before if ".auxiliary." in name}
    learnt = [row for row in rows(second) if "train/loss" in row]
    for name in ("auxiliary", "depth_auxiliary"):
        assert learnt[-1][f"experts/0/{name}"] < 0.95 * learnt[0][f"experts/0/{name}"]
    for name in ("auxiliary_accuracy", "depth_accuracy"):
        assert 0.5 < learnt[-1][f"experts/0/{name}"] <= 1
    assert not any("auxiliary" in key for row in rows(first) for key in row), "nothing was learnt of them before"
    # Without auxiliary routers the model is judged by the routing that it was trained with.
    route_as_in_training(model)
    windows = _dev_windows(first, TextEncoder(first.tokenizer_dir).eos_id)["ants"]
    count, total = first.train.batch_tokens // first.train.sequence_length, 0.0
    for begin in range(0, len(windows.inputs), count):
        inputs, targets = (torch.from_numpy(part[begin : begin + count]) for part in (windows.inputs, windows.targets))
        total += float(token_losses(model, inputs, targets, experts=ExpertPass(is_real=targets != IGNORED)).sum())
    measured = json.loads((Path(first.output_dir) / "result.json").read_text())["dev_loss"]["ants"]
    assert measured == pytest.approx(total / len(windows.token_ids), rel=1e-4)


def test_killed_training_of_auxiliary_routers_ends_with_the_same_bits(make_spec):
    ffn = FfnConfig(layer="modality", group_sizes=[2, 2], modality_starts=[130], auxiliary_weight=0)
    first = make_spec("first", ffn=ffn, last_update=2)
    assert run(first) == 0
    changes = {
        "ffn": ffn.model_copy(update={"auxiliary_weight": 1.0}),
        "start": Start(kind="weights", path=str(Path(first.output_dir) / "model")),
        "trains_auxiliary_only": True,
        "last_update": 100,
        "total_updates": 100,
        "checkpoint_every": 4,
    }
    plain, killed = make_spec("plain", **changes), make_spec("killed", **changes)
    assert run(plain) == 0
    assert run(killed, before=lambda: die_behind_checkpoint(killed)) == -signal.SIGKILL
    assert run(killed) == 0
    assert outcome(killed) == outcome(plain)


def test_modalities_are_asked_from_the_tokenizer(make_spec):
    """The tokenizer of this corpus has no image codes, which two groups of experts need."""
    spec = make_spec("two", ffn=FfnConfig(layer="modality", group_sizes=[2, 2]))
    assert run(spec) == 1
    assert "has 1 modalities, ffn.group_sizes=[2, 2] asks for 2" in log(spec)
    assert run(make_spec("one", ffn=FfnConfig(layer="modality", group_sizes=[3]), last_update=2)) == 0


def test_a_start_with_other_expert_layers_is_refused(make_spec):
    first = make_spec("first", ffn=FfnConfig(**SMALL_FFN), last_update=2)
    assert run(first) == 0
    start_from = Start(kind="weights", path=str(Path(first.output_dir) / "model"))
    second = make_spec("second", ffn=FfnConfig(layer="demix"), start=start_from)
    assert run(second) == 1
    assert "ffn=top_k, asked is ffn=demix" in log(second)
    assert run(make_spec("third", ffn=FfnConfig(**SMALL_FFN), start=start_from, trains_auxiliary_only=True)) == 1


def test_demix_batches_have_equally_many_sequences_of_each_domain(corpus):
    sources = [
        TokenSource(domain=domain, prefix=str(corpus / domain / "train"), weight=weight)
        for domain, weight in (("ants", 5.0), ("bees", 1.0))
    ]
    settings = {"sequence_length": 16, "seed": 1, "eos_id": 0, "domains": ["cats", "bees", "ants"]}
    sampler = BatchSampler(sources, batch_sequences=6, is_balanced=True, **settings)
    for update in range(4):
        assert np.bincount(sampler.batch(update).domain, minlength=3).tolist() == [0, 3, 3]
    with pytest.raises(DataError, match="multiple of 2"):
        BatchSampler(sources, batch_sequences=5, is_balanced=True, **settings)
    with pytest.raises(DataError, match="'ants' is not among those of the model: bees"):
        BatchSampler(sources, batch_sequences=6, **(settings | {"domains": ["bees"]}))


@pytest.mark.parametrize(("layer", "is_free"), [("dense", True), ("demix", True), ("top_k", False), ("base", False)])
def test_passes_of_other_sizes_are_another_training_where_layers_look_at_the_whole_pass(make_spec, layer, is_free):
    spec = make_spec(ffn=FfnConfig(layer=layer))
    stored = make_spec(ffn=FfnConfig(layer=layer), micro_batch_sequences=2).model_dump(mode="json", by_alias=True)
    assert (differences(stored, spec) == []) == is_free


def test_a_checkpoint_of_other_experts_is_refused(make_spec):
    assert run(make_spec("run", ffn=FfnConfig(**SMALL_FFN), last_update=5)) == 0
    (Path(make_spec("run").output_dir) / "result.json").unlink()
    other = make_spec("run", ffn=FfnConfig(layer="top_k", num_experts=5), last_update=5)
    assert run(other) == 1
    assert "ffn.num_experts: 4 before, 5 now" in (Path(other.output_dir) / "log.txt").read_text()
