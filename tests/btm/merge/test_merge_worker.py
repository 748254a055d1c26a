"""The whole stage: real transformers models in, a directory that transformers loads out, whatever happens between."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import hashes, merge, spec_for, worker, write_model, write_tokenizer
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    LlamaConfig,
    Olmo2Config,
    PreTrainedConfig,
    Qwen3Config,
)

from btm.errors import MergeError
from btm.files import sha256_of_file
from btm.merge.worker import merge_models, run_spec
from btm.records import MergeResult
from btm.requests import MergeInput, ScoreSource

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
ARCHITECTURES: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**SIZES),
    "llama-tied": LlamaConfig(**SIZES, tie_word_embeddings=True),
    "qwen3-tied": Qwen3Config(**SIZES, tie_word_embeddings=True),
    "olmo2": Olmo2Config(**{**SIZES, "num_key_value_heads": 2}),
    "gpt2": GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0),
}


def real_models(folder: Path, config: PreTrainedConfig, dtype=torch.bfloat16, count=3) -> list[Path]:
    paths = []
    for index in range(count):
        torch.manual_seed(index)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        for parameter in model.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
        paths.append(folder / f"elm{index}")
        model.to(dtype).save_pretrained(paths[-1])
        write_tokenizer(paths[-1])
    return paths


def state(path: Path) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).state_dict()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_logits_equal_those_of_averaged_state_dicts(tmp_path, name):
    paths = real_models(tmp_path, ARCHITECTURES[name])
    merge(tmp_path / "out", paths)
    states = [state(path) for path in paths]
    mean = {key: (sum(s[key] for s in states) / len(states)).bfloat16().float() for key in states[0]}
    expected = AutoModelForCausalLM.from_config(ARCHITECTURES[name], dtype=torch.float32).eval()
    expected.load_state_dict(mean)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    tokens = AutoTokenizer.from_pretrained(tmp_path / "out")("ABC DEF", return_tensors="pt")["input_ids"] % 64
    with torch.no_grad():
        assert torch.equal(loaded.eval()(tokens).logits, expected(tokens).logits)
    if name.endswith("tied") or name == "gpt2":
        assert loaded.get_input_embeddings().weight is loaded.get_output_embeddings().weight


def test_stored_type_is_kept(tmp_path):
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        paths = real_models(tmp_path / str(dtype), ARCHITECTURES["llama"], dtype, count=2)
        merge(tmp_path / "out", paths)
        assert AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").dtype is dtype


def test_the_card_and_the_provenance_say_what_went_in(tmp_path):
    paths = real_models(tmp_path, ARCHITECTURES["llama"])
    record = {"files": {"model.safetensors": sha256_of_file(paths[1] / "model.safetensors")}}
    weights = {"elm1": 3.0, "elm0": 1.0}
    spec = spec_for(tmp_path / "out", paths, "weighted", weights=weights, elm1=record)
    result = run_spec(spec)
    card = (tmp_path / "out/README.md").read_text()
    assert f"| `elm1` | 0.75 | `{record['files']['model.safetensors']}` |" in card
    assert "| `elm0` | 0.25 | not recorded |" in card
    assert "Left out (weight 0): `elm2`" in card
    assert "https://arxiv.org/abs/2208.03306" in card
    story = json.loads((tmp_path / "out/merge.json").read_text())
    assert [model["weight"] for model in story["models"]] == [0.25, 0.75, 0.0]
    assert story["files"] == {"model.safetensors": hashes(tmp_path / "out")["model.safetensors"]}
    assert str(tmp_path) not in card + json.dumps(story)
    stored = MergeResult.load(tmp_path / "out.json")
    assert stored == result
    assert stored.spec_sha256 == spec.sha256
    assert stored.weights == {"elm0": 0.25, "elm1": 0.75, "elm2": 0.0}


def test_m2_r16_two_merges_give_the_same_bytes_and_inputs_stay(tmp_path):
    paths = real_models(tmp_path, ARCHITECTURES["olmo2"])
    before = [hashes(path) for path in paths]
    merge(tmp_path / "out", paths)
    first = hashes(tmp_path / "out")
    merge(tmp_path / "out", paths)
    assert hashes(tmp_path / "out") == first
    assert [hashes(path) for path in paths] == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["elm0", "elm1", "elm2", "out", "out.json"]


def test_m6_one_hot_gives_the_file_of_the_model(tmp_path):
    paths = real_models(tmp_path, ARCHITECTURES["llama-tied"])
    merge(tmp_path / "out", paths, "weighted", weights={"elm2": 1.0})
    merged, original = state(tmp_path / "out"), state(paths[2])
    assert all(torch.equal(merged[key], original[key]) for key in original)
    assert merge_models({"elm2": paths[2]}, tmp_path / "copy").files == MergeResult.load(tmp_path / "out.json").files


def test_the_worker_reports_errors_in_one_line(tmp_path):
    paths = [write_model(tmp_path / f"m{index}", {"a": torch.ones(3 + index)}) for index in range(2)]
    spec_for(tmp_path / "out", paths).save(tmp_path / "spec.json")
    process = worker(tmp_path / "spec.json")
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (1, "")
    assert err.startswith("error: tensor 'a' has shape (3,)")
    assert len(err.splitlines()) == 1


def test_worker_does_not_import_torch(tmp_path):
    paths = [write_model(tmp_path / f"m{index}", {"a": torch.ones(3)}) for index in range(2)]
    spec_for(tmp_path / "out", paths).save(tmp_path / "spec.json")
    program = (
        "import sys, btm.merge.worker as w\n"
        "assert w.main(sys.argv[1:]) == 0\n"
        "print(sorted({'torch', 'transformers', 'ray', 'safetensors'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "spec.json")], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def dev_split(folder: Path) -> ScoreSource:
    from btm.corpus.shards import ShardWriter

    generator = np.random.default_rng(0)
    with ShardWriter(folder / "dev", 64) as writer:
        for _ in range(4):
            writer.add(np.append(generator.integers(1, 64, 30), 0), 31)
    return ScoreSource(key="dev-law", prefix=str(folder / "dev"), fingerprint="x")


def test_m5_greedy_soup_judged_on_real_dev_documents(tmp_path):
    from btm.merge.judge import dev_judge

    paths = real_models(tmp_path, ARCHITECTURES["llama-tied"])
    spec = spec_for(tmp_path / "out", paths, "greedy_soup", domain="law", dev=dev_split(tmp_path), sequence_length=16)
    result = run_spec(spec)
    judge = dev_judge(spec)
    assert judge is not None
    singles = {path.name: judge(path) for path in paths}
    best = min(singles, key=lambda name: singles[name])
    assert result.weights[best] > 0
    assert judge(tmp_path / "out") <= singles[best]
    kept = [path for path in paths if result.weights[path.name]]
    assert merge_models({path.name: path for path in kept}, tmp_path / "again").files == result.files
    assert not list(tmp_path.glob(".tmp-*"))
    with pytest.raises(MergeError, match="dev-law is not of the target domain news"):
        run_spec(spec.model_copy(update={"domain": "news"}))


def test_posterior_average_uses_the_weights_of_the_scores(tmp_path):
    paths = real_models(tmp_path, ARCHITECTURES["gpt2"], count=2)
    inputs = []
    for path, loss in zip(paths, (1.0, 1.2), strict=True):
        np.savez(path / "dev-law.npz", logp=np.full(20, -loss, np.float32), document_starts=np.array([0, 20]))
        inputs.append(MergeInput(name=path.name, directory=str(path), score_dir=str(path)))
    spec = spec_for(tmp_path / "out", paths, "posterior", domain="law").model_copy(update={"models": inputs})
    weights = run_spec(spec).weights
    odds = 1 / (1 + np.exp(-0.2 * np.arange(20)))
    assert weights["elm0"] == pytest.approx(odds.mean())
    assert weights["elm1"] == pytest.approx(1 - odds.mean())
