"""Upcycling: from one expert per modality to several (systems 5 (e), Upcycle)."""

import json
import signal
from pathlib import Path

import pytest
import torch
from training_runs import die_behind_checkpoint, log, outcome, rows, run

from btm.config_ffn import FfnConfig
from btm.config_model import ModelConfig
from btm.corpus.tokenizer import train_tokenizer
from btm.errors import CheckpointError, ForestError
from btm.model.causal_lm import build_model, load_model
from btm.model.sparse_lm import add_experts
from btm.model.upcycle import upcycle
from btm.records import Ledger, TrainResult
from btm.requests import Start
from btm.upcycle_seed import UpcycleSeed

ONE_EACH = FfnConfig(layer="modality", group_sizes=[1, 1], modality_starts=[130])
SEVERAL = FfnConfig(layer="modality", group_sizes=[3, 2], is_noisy=True, auxiliary_weight=0)


def seed_model(ffn=ONE_EACH, **sizes):
    model = build_model(
        ModelConfig(**({"num_layers": 2, "hidden_size": 32, "num_heads": 2} | sizes)), vocab_size=200, eos_id=0, seed=1
    )
    add_experts(model, ffn, ["ants"], seed=4)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(
                0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel()))
            )
    return model.eval()


def test_the_network_of_a_modality_goes_to_all_its_experts_and_the_rest_stays():
    seed = seed_model()
    model = upcycle(seed, SEVERAL, random_seed=0)
    old, new = seed.state_dict(), model.state_dict()
    assert {name for name in new if name in old and not torch.equal(new[name], old[name])} == {
        name for name in new if "layer.experts" in name or "layer.router" in name
    }
    for block in range(2):
        for stack in ("w1_EDF", "w3_EDF", "w2_EFD"):
            name = f"model.layers.{block}.mlp.layer.experts.{stack}"
            text, image = old[name]
            assert all(torch.equal(expert, text) for expert in new[name][:3])
            assert all(torch.equal(expert, image) for expert in new[name][3:])
    router = new["model.layers.0.mlp.layer.router.weight_ED"]
    assert len({tuple(row.tolist()) for row in router}) == 5, "routers are random, so that experts come to differ"
    assert model.get_submodule("model.layers.0.mlp.layer.router").is_noisy
    assert not torch.equal(
        router, upcycle(seed, SEVERAL, random_seed=1).state_dict()["model.layers.0.mlp.layer.router.weight_ED"]
    )


@torch.no_grad()
def test_one_expert_per_modality_again_is_the_seed():
    seed = seed_model()
    ids = torch.randint(0, 200, (3, 12), generator=torch.Generator().manual_seed(0))
    again = upcycle(seed, ONE_EACH, random_seed=9)
    assert torch.equal(again(input_ids=ids).logits, seed(input_ids=ids).logits)
    several = upcycle(seed, SEVERAL, random_seed=9)
    assert not torch.allclose(several(input_ids=ids).logits, seed(input_ids=ids).logits, atol=1e-3)


@torch.no_grad()
def test_with_scores_of_one_and_every_token_chosen_once_several_experts_are_the_seed():
    """What upcycling changes is scores and choice alone: with each token at exactly one expert nothing would."""
    seed = seed_model()
    model = upcycle(seed, SEVERAL, random_seed=9)
    ids = torch.randint(0, 200, (3, 12), generator=torch.Generator().manual_seed(0))
    for block in range(2):
        router = model.get_submodule(f"model.layers.{block}.mlp.layer.router")
        router.weight_ED.zero_()
        router.auxiliary.outer.weight.zero_()
        # Of each group the first expert takes all, with the score 1/2, which the matrix behind it makes up for.
        router.auxiliary.outer.bias.copy_(torch.tensor([1.0, -1, -1, 1, -1]))
        model.get_submodule(f"model.layers.{block}.mlp.layer.experts").w2_EFD.mul_(2)
    torch.testing.assert_close(model(input_ids=ids).logits, seed(input_ids=ids).logits)


def test_depths_may_be_added():
    model = upcycle(seed_model(), SEVERAL.model_copy(update={"depth_fraction": 0.5}), random_seed=0)
    inner = model.state_dict()["model.layers.0.mlp.layer.layer.experts.w1_EDF"]
    assert torch.equal(inner[0], seed_model().state_dict()["model.layers.0.mlp.layer.experts.w1_EDF"][0])


@pytest.mark.parametrize(
    ("seed_ffn", "wanted", "words"),
    [
        (None, SEVERAL, "got a dense model; train a seed"),
        (FfnConfig(layer="modality", group_sizes=[2, 1], modality_starts=[130]), SEVERAL, r"groups of \[2, 1\]"),
        (ONE_EACH, FfnConfig(layer="modality", group_sizes=[2]), "has 2 modalities"),
        (ONE_EACH, SEVERAL.model_copy(update={"layers": [0]}), r"in blocks \[0, 1\], asked are \[0\]"),
        (ONE_EACH, SEVERAL.model_copy(update={"hidden_width": 40}), "asked are 40"),
    ],
)
def test_what_cannot_be_upcycled_is_refused(seed_ffn, wanted, words):
    seed = seed_model(FfnConfig()) if seed_ffn is None else seed_model(seed_ffn)
    with pytest.raises(CheckpointError, match=words):
        upcycle(seed, wanted, random_seed=0)


@pytest.fixture
def trained_seed(make_spec):
    spec = make_spec("seed", ffn=ONE_EACH, total_updates=20)
    assert run(spec) == 0
    spec.save(Path(spec.output_dir) / "spec.json")
    return spec


def upcycling(make_spec, seed, name="upcycled", **changes):
    start_from = Start(kind="upcycle", path=str(Path(seed.output_dir) / "model"), sha256="s")
    request = {"ffn": SEVERAL, "start": start_from, "first_batch": 20, "total_updates": 20}
    return make_spec(name, **(request | changes))


def test_a_run_is_upcycled_and_says_what_that_did_to_the_loss(make_spec, trained_seed):
    spec = upcycling(make_spec, trained_seed)
    assert run(spec) == 0
    first = rows(spec)[0]
    seed_loss = json.loads((Path(trained_seed.output_dir) / "result.json").read_text())["dev_loss"]
    assert first["update"] == 0
    for domain in ("ants", "bees"):
        assert first[f"eval/{domain}/seed_loss"] == pytest.approx(seed_loss[domain], rel=1e-3)
        jump = first[f"eval/{domain}/loss"] - first[f"eval/{domain}/seed_loss"]
        assert first[f"eval/{domain}/upcycling_jump"] == pytest.approx(jump)
        assert jump > 0, "scores of about one half change what the copied networks add"
    assert "upcycling ants: dev loss" in log(spec)
    trained = [row for row in rows(spec) if "train/loss" in row]
    last_of_seed = [row for row in rows(trained_seed) if "train/loss" in row][-1]
    assert trained[0]["train/lr"] > 5 * last_of_seed["train/lr"], "the schedule begins anew"
    model = load_model(Path(spec.output_dir) / "model")
    w1_EDF = model.state_dict()["model.layers.0.mlp.layer.experts.w1_EDF"]
    assert not torch.equal(w1_EDF[0], w1_EDF[1]), "experts have come to differ"


def test_it_goes_on_behind_the_documents_of_its_seed(make_spec, trained_seed):
    from btm.model.causal_lm import load_model as load
    from btm.train.start import _make_sampler

    spec = upcycling(make_spec, trained_seed)
    model = load(Path(trained_seed.output_dir) / "model")
    ours, seeds = _make_sampler(spec, model, 0), _make_sampler(trained_seed, model, 0)
    assert (ours.batch(0).tokens == seeds.batch(20).tokens).all()
    assert (ours.batch(0).tokens != seeds.batch(0).tokens).any()


def test_a_killed_upcycled_run_ends_with_the_same_bits(make_spec, trained_seed):
    long = {"last_update": 60, "total_updates": 60, "checkpoint_every": 4}
    plain, killed = (upcycling(make_spec, trained_seed, name, **long) for name in ("plain", "killed"))
    assert run(plain) == 0
    assert run(killed, before=lambda: die_behind_checkpoint(killed)) == -signal.SIGKILL
    assert run(killed) == 0
    assert outcome(killed) == outcome(plain)


def test_another_tokenizer_and_other_sizes_are_refused(make_spec, trained_seed, tmp_path):
    train_tokenizer(["quite different words"], tmp_path / "other", vocab_size=270)
    other = upcycling(make_spec, trained_seed, "other").model_copy(update={"tokenizer_dir": str(tmp_path / "other")})
    assert run(other) == 1
    assert "was trained with another tokenizer" in log(other)
    assert "tokenizer.path=" in log(other)
    wider = upcycling(make_spec, trained_seed, "wider")
    wider = wider.model_copy(update={"model": wider.model.model_copy(update={"hidden_size": 64})})
    assert run(wider) == 1
    assert "hidden_size is 32, asked is 64" in log(wider)


def test_the_seed_is_found_in_a_forest_or_by_its_model(tmp_path, make_spec):
    run_dir = tmp_path / "forest/runs/sparse"
    with pytest.raises(ForestError, match="holds no finished sparse model"):
        UpcycleSeed.find(tmp_path / "forest")
    (run_dir / "model").mkdir(parents=True)
    (run_dir / "model/model.safetensors").write_bytes(b"weights")
    unknown = UpcycleSeed.find(tmp_path / "forest")
    assert unknown == UpcycleSeed.find(run_dir / "model")
    assert (unknown.ledger, len(unknown.sha256)) == (Ledger(), 64)
    spec = make_spec()
    assert unknown.batches_read(spec.sources, 128) == 0
    spec.save(run_dir / "spec.json")
    result = {"name": "sparse", "spec_sha256": "abc", "model_dir": "", "updates": 5, "skipped_updates": 0}
    ledger = Ledger(tokens=640, flops=1.0, seconds=2.0)
    TrainResult(**result, final_loss=1.0, num_parameters=1, ledger=ledger).save(run_dir / "result.json")
    known = UpcycleSeed.find(tmp_path / "forest")
    assert (known.ledger, known.sha256) == (ledger, "abc")
    assert known.batches_read(spec.sources, 128) == 5
    others = [source.model_copy(update={"fingerprint": "other"}) for source in spec.sources]
    assert known.batches_read(others, 128) == 0
