"""M3 and M4: models that do not fit together are refused, and the message names both and what differs."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import merge, spec_for, write_model, write_tokenizer

from btm.config_merge import MergeMethodName
from btm.errors import MergeError
from btm.merge.worker import merge_models, run_spec
from btm.requests import MergeInput


def two_models(tmp_path, first=None, second=None, **config):
    tensors = {"embed_tokens.weight": torch.ones(64, 8), "norm.weight": torch.ones(8)}
    one = write_model(tmp_path / "one", {**tensors, **(first or {})})
    return [one, write_model(tmp_path / "two", {**tensors, **(second or {})}, **config)]


MISMATCHES = {
    "vocabulary": ({}, {"embed_tokens.weight": torch.ones(72, 8)}, {"vocab_size": 72}, r"vocab_size: 64 and 72"),
    "vocabulary in the weights alone": (
        {},
        {"embed_tokens.weight": torch.ones(72, 8)},
        {},
        r"'embed_tokens.weight' has shape \(64, 8\) in .*one.*\(72, 8\) in .*two",
    ),
    "shape": ({}, {"norm.weight": torch.ones(4, 2)}, {}, r"'norm.weight' has shape \(8,\) in .*one.*\(4, 2\) in .*two"),
    "dtype": (
        {},
        {"norm.weight": torch.ones(8).bfloat16()},
        {},
        r"'norm.weight' has dtype F32 in .*one.*BF16 in .*two",
    ),
    "key only in the first": ({"extra": torch.ones(1)}, {}, {}, r"'extra' is in .*one.* but not in .*two"),
    "key only in the second": ({}, {"extra": torch.ones(1)}, {}, r"'extra' is in .*two.* but not in .*one"),
    "architecture": ({}, {}, {"model_type": "qwen3"}, r"model_type: 'llama' and 'qwen3'"),
    "width": ({}, {}, {"hidden_size": 16}, r"hidden_size: 8 and 16"),
}


@pytest.mark.parametrize("case", MISMATCHES)
def test_m4_mismatches_name_both_files_and_both_values(tmp_path, case):
    first, second, config, message = MISMATCHES[case]
    models = two_models(tmp_path, first, second, **config)
    for order in (models, models[::-1]):
        with pytest.raises(MergeError) as caught:
            merge(tmp_path / "out", order)
        assert str(models[0]) in str(caught.value)
        assert str(models[1]) in str(caught.value)
    with pytest.raises(MergeError, match=message):
        merge(tmp_path / "out", models)
    assert not (tmp_path / "out").exists()


def test_settings_that_shape_no_weight_may_differ(tmp_path):
    models = two_models(tmp_path, transformers_version="4.0", use_cache=False, attention_dropout=0.1, eos_token_id=7)
    merge(tmp_path / "out", models)


def test_m4_tokenizers_must_agree(tmp_path):
    models = two_models(tmp_path)
    write_tokenizer(models[0])
    write_tokenizer(models[1], intruder=64)
    with pytest.raises(MergeError, match=r"one/tokenizer.json and .*two/tokenizer.json differ.*intruder.*None and 64"):
        merge(tmp_path / "out", models)
    write_tokenizer(models[1])
    content = json.loads((models[1] / "tokenizer.json").read_text())
    content["padding"] = {"strategy": "BatchLongest"} | {"direction": "Right", "pad_id": 0, "pad_token": "<eos>"}
    (models[1] / "tokenizer.json").write_text(json.dumps(content))
    merge(tmp_path / "out", models)
    forest_tokenizer = write_tokenizer(tmp_path / "tokenizer", newcomer=64)
    with pytest.raises(MergeError, match=r"tokenizer/tokenizer.json and .*one/tokenizer.json differ"):
        merge(tmp_path / "out2", models, tokenizer_dir=str(forest_tokenizer))


def test_m3_tied_weights_stay_tied(tmp_path):
    def model(name, value, head):
        tensors = {"model.embed_tokens.weight": torch.full((64, 8), value)}
        if head is not None:
            tensors["lm_head.weight"] = torch.full((64, 8), head)
        return write_model(tmp_path / name, tensors, tie_word_embeddings=True)

    models = [model("one", 1.0, 1.0), model("two", 3.0, None)]
    merge(tmp_path / "out", models)
    merged = load_file(tmp_path / "out/model.safetensors")
    assert list(merged) == ["model.embed_tokens.weight"]
    assert bool((merged["model.embed_tokens.weight"] == 2).all())
    model("two", 3.0, 4.0)
    with pytest.raises(MergeError, match=r"two: config.json ties 'lm_head.weight' to 'model.embed_tokens.weight'"):
        merge(tmp_path / "out", models)


def remove_weights(folder):
    (folder / "model.safetensors").unlink()


def only_a_pickle(folder):
    remove_weights(folder)
    torch.save({}, folder / "pytorch_model.bin")


def index_of(places):
    def damage(folder):
        remove_weights(folder)
        save_file({"a": torch.ones(1)}, folder / "model-1.safetensors")
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))

    return damage


DAMAGES = {
    "directory missing": (shutil.rmtree, "is not a directory"),
    "no config": (lambda f: (f / "config.json").unlink(), "has no config.json"),
    "config is no JSON": (lambda f: (f / "config.json").write_text("{"), "config.json is not valid JSON"),
    "config is a list": (lambda f: (f / "config.json").write_text("[]"), "must hold a JSON object"),
    "config nested too deep": (lambda f: (f / "config.json").write_text("[" * 200_000), "is not valid JSON"),
    "code of its own": (lambda f: write_model(f, {"a": torch.ones(1)}, auto_map={"AutoModel": "x.y"}), "auto_map"),
    "no weights": (remove_weights, "has no model.safetensors"),
    "only a pickle": (only_a_pickle, "only as pickles"),
    "no tensors": (lambda f: write_model(f, {}), "holds no tensor"),
    "truncated": (lambda f: (f / "model.safetensors").write_bytes(b"\x10"), "not a sound safetensors file"),
    "index leaves the directory": (index_of({"a": "../one/model.safetensors"}), "same directory"),
    "index names a pickle": (index_of({"a": "model.bin"}), "only .safetensors"),
    "index names a missing shard": (index_of({"a": "model-2.safetensors"}), "missing or not a regular file"),
    "index names a missing tensor": (index_of({"a": "model-1.safetensors", "b": "model-1.safetensors"}), "tensor 'b'"),
    "shard holds another tensor": (index_of({"b": "model-1.safetensors"}), "places tensor 'a' in None"),
    "index without map": (index_of(None), "weight_map"),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_broken_directories_are_refused(tmp_path, case):
    damage, message = DAMAGES[case]
    models = two_models(tmp_path)
    damage(models[1])
    with pytest.raises(MergeError, match=message):
        merge(tmp_path / "out", models)
    assert not (tmp_path / "out").exists()


def test_requests_that_make_no_sense_are_refused(tmp_path):
    models = two_models(tmp_path)
    with pytest.raises(MergeError, match="no model to merge"):
        merge(tmp_path / "out", [])
    with pytest.raises(MergeError, match="same name"):
        merge(tmp_path / "out", [models[0], models[0]])
    spec = spec_for(tmp_path / "out", models)
    inside = spec.model_copy(update={"output_dir": str(models[0])})
    with pytest.raises(MergeError, match="would overwrite model 'one'"):
        run_spec(inside)
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.txt").write_text("years of work")
    with pytest.raises(MergeError, match="is not a merged model"):
        run_spec(spec.model_copy(update={"output_dir": str(precious)}))
    assert (precious / "thesis.txt").read_text() == "years of work"
    empty = tmp_path / "tokens"
    empty.mkdir()
    with pytest.raises(MergeError, match="holds no tokenizer"):
        run_spec(spec.model_copy(update={"tokenizer_dir": str(empty)}))
    assert not (tmp_path / "out").exists()


def test_weights_that_make_no_sense_are_refused(tmp_path):
    models = two_models(tmp_path)
    for weights in ({"one": -1.0}, {"one": 0.0}, {}, {"one": 1.0, "three": 1.0}):
        with pytest.raises(MergeError, match=r"weights"):
            merge(tmp_path / "out", models, "weighted", weights=weights)
    with pytest.raises(MergeError, match=r"weights must be finite"):
        merge_models(
            {path.name: path for path in models},
            tmp_path / "out",
            method=MergeMethodName.weighted,
            weights={"one": float("nan")},
        )


@pytest.mark.parametrize("name", ["../x", "a|b", "a\n# b", "", "con", "x" * 65])
def test_names_that_are_no_names_are_refused(tmp_path, name):
    models = two_models(tmp_path)
    spec = spec_for(tmp_path / "out", models)
    odd = [MergeInput(name=name, directory=str(models[0])), spec.models[1]]
    with pytest.raises(MergeError, match="cannot be a name"):
        run_spec(spec.model_copy(update={"models": odd}))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "two"]
