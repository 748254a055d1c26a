import hashlib
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from btm.budget import model_size
from btm.config_model import ModelConfig
from btm.errors import CheckpointError
from btm.model.causal_lm import build_model, flops_per_token, load_model, num_parameters, save_model


def _digest(model) -> str:
    digest = hashlib.sha256()
    for parameter in model.parameters():
        digest.update(parameter.detach().numpy().tobytes())
    return digest.hexdigest()


def _digests(folder) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


@pytest.fixture
def saved(make_model, tmp_path):
    folder = tmp_path / "model"
    save_model(make_model(), folder, torch.float32)
    return folder


def test_weights_depend_on_the_seed_alone(make_model):
    before = torch.get_num_threads()
    torch.manual_seed(1)
    torch.set_num_threads(1)
    one = _digest(make_model(seed=5, hidden_size=128))
    torch.manual_seed(2)
    torch.set_num_threads(2)
    two = _digest(make_model(seed=5, hidden_size=128))
    torch.set_num_threads(before)
    assert one == two
    assert one != _digest(make_model(seed=6, hidden_size=128))


def test_building_leaves_the_random_state_alone(make_model):
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    make_model(seed=8)
    assert torch.equal(torch.rand(4), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("arch", ["llama", "gpt2", "qwen3"])
def test_auto_model_reads_the_same_logits(make_model, tokens, tmp_path, arch, dtype):
    model = make_model(arch, num_kv_heads=4).eval()
    save_model(model, tmp_path / "model", dtype)
    assert {"config.json", "generation_config.json", "model.safetensors"} == set(_digests(tmp_path / "model"))
    rounded = load_file(tmp_path / "model" / "model.safetensors")
    assert {tensor.dtype for tensor in rounded.values()} == {dtype}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.to(dtype))
        read = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
        assert torch.equal(read(tokens[0]).logits, model(tokens[0]).logits)
        assert torch.equal(load_model(tmp_path / "model")(tokens[0]).logits, model(tokens[0]).logits)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype="auto").dtype == dtype


def test_equal_weights_give_equal_bytes(make_model, tmp_path):
    for name in ("one", "two"):
        save_model(make_model(), tmp_path / name, torch.bfloat16)
    assert _digests(tmp_path / "one") == _digests(tmp_path / "two")


def test_saving_does_not_change_the_model_and_replaces_the_directory(make_model, tmp_path):
    model = make_model()
    before = _digest(model)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "stale.txt").write_text("old")
    save_model(model, tmp_path / "model", torch.bfloat16)
    assert _digest(model) == before
    assert not (tmp_path / "model" / "stale.txt").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("tied", [True, False])
def test_tied_embeddings_stay_tied(make_model, tmp_path, tied):
    save_model(make_model(tie_embeddings=tied), tmp_path / "model", torch.float32)
    names = load_file(tmp_path / "model" / "model.safetensors").keys()
    assert ("lm_head.weight" in names) is not tied
    model = load_model(tmp_path / "model")
    assert (model.lm_head.weight is model.model.embed_tokens.weight) is tied


def test_tokenizer_files_are_copied(make_model, tmp_path):
    tokenizer = tmp_path / "tokenizer"
    tokenizer.mkdir()
    (tokenizer / "tokenizer.json").write_text("{}")
    (tokenizer / "notes.txt").write_text("not a tokenizer file")
    save_model(make_model(), tmp_path / "model", torch.float32, tokenizer)
    assert (tmp_path / "model" / "tokenizer.json").read_text() == "{}"
    assert not (tmp_path / "model" / "notes.txt").exists()
    (tokenizer / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match="no tokenizer files"):
        save_model(make_model(), tmp_path / "other", torch.float32, tokenizer)
    assert not (tmp_path / "other").exists()


def _only_pickles(folder):
    torch.save({}, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def _no_weights(folder):
    (folder / "model.safetensors").unlink()


def _truncated(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])


def _missing_tensor(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors.pop("model.norm.weight")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def _wrong_shape(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] = torch.ones(5)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def _no_config(folder):
    (folder / "config.json").unlink()


def _own_code(folder):
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "model_type": "home_made",
        "auto_map": {"AutoModelForCausalLM": "evil.Model", "AutoConfig": "evil.Config"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "evil.py").write_text(f"open({str(folder / 'ran')!r}, 'w')\n")


def _not_a_language_model(folder):
    (folder / "config.json").write_text(json.dumps({"model_type": "vit"}))


def _shard_elsewhere(folder):
    (folder / "model.safetensors").unlink()
    index = {"weight_map": {"model.norm.weight": "../other/model.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _shard_missing(folder):
    (folder / "model.safetensors").unlink()
    index = {"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _gone(folder):
    shutil.rmtree(folder)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_only_pickles, "only as pickles"),
        (_no_weights, "has no model.safetensors"),
        (_truncated, "does not load"),
        (_missing_tensor, r"lacks 1 tensors .*model\.norm\.weight"),
        (_wrong_shape, "another shape|does not load"),
        (_no_config, "has no config.json"),
        (_own_code, "does not load"),
        (_not_a_language_model, "does not load"),
        (_shard_elsewhere, "not a .safetensors file beside it"),
        (_shard_missing, "lacks model-00001-of-00002.safetensors"),
        (_gone, "is not a directory"),
    ],
)
def test_damaged_and_hostile_directories_are_refused(saved, damage, message):
    damage(saved)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_model(saved)
    assert str(saved) in str(caught.value)
    assert not (saved / "ran").exists()


def test_a_larger_tokenizer_is_refused(saved):
    load_model(saved, vocab_size=300)
    with pytest.raises(CheckpointError, match="tokenizer has 301"):
        load_model(saved, vocab_size=301)


@pytest.mark.parametrize("tied", [True, False])
def test_flops_are_those_of_the_plan(tied):
    config = ModelConfig(num_layers=3, hidden_size=48, num_heads=4, num_kv_heads=2, tie_embeddings=tied)
    model = build_model(config, vocab_size=300, eos_id=0, seed=0)
    size = model_size(config, 300)
    assert num_parameters(model) == size.num_parameters
    assert flops_per_token(model, 64) == flops_per_token(model.config, 64) == size.flops_per_token(64)


def test_flops_of_a_dense_layer_are_counted_by_hand(make_model):
    """GPT-2: per layer 12 h^2 weights; head V h; the position table multiplies nothing."""
    model = make_model("gpt2", num_kv_heads=4, intermediate_size=128)
    assert flops_per_token(model, 10) == 6 * (2 * 12 * 32**2 + 300 * 32) + 12 * 2 * 32 * 10
