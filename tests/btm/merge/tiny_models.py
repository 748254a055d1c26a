"""Small model directories for the merge tests: arbitrary tensors, or real transformers models."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers

from btm.config_merge import MergeMethodName
from btm.merge.worker import run_spec
from btm.records import MergeResult
from btm.requests import MergeInput, MergeSpec

CONFIG = {"model_type": "llama", "vocab_size": 64, "hidden_size": 8, "tie_word_embeddings": False}


def write_tokenizer(directory: Path, **extra: int) -> Path:
    """A byte-level tokenizer of 64 entries, and some more by name."""
    directory.mkdir(parents=True, exist_ok=True)
    vocabulary = {"<eos>": 0, **{chr(32 + index): index for index in range(1, 64)}, **extra}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<eos>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    return directory


def write_model(directory: Path, tensors: dict[str, torch.Tensor], **config: object) -> Path:
    """A model directory with these tensors, each stored on its own."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps({**CONFIG, **config}))
    save_file({name: tensor.clone().contiguous() for name, tensor in tensors.items()}, directory / "model.safetensors")
    return directory


def spec_for(output: Path, models: list[Path], method: str = "uniform", **fields) -> MergeSpec:
    """A request to average directories, named after their folders, with the tokenizer of the first."""
    inputs = [MergeInput(name=path.name, directory=str(path), **fields.pop(path.name, {})) for path in models]
    fields = {"tokenizer_dir": "", "name": output.name, **fields}
    return MergeSpec(method=MergeMethodName(method), models=inputs, output_dir=str(output), **fields)


def merge(output: Path, models: list[Path], method: str = "uniform", **fields) -> MergeResult:
    """Run the request in this process."""
    return run_spec(spec_for(output, models, method, **fields))


def hashes(directory: Path) -> dict[str, str]:
    """File name -> SHA-256 of everything in a directory."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(directory.iterdir())}


def worker(spec_path: Path, **options) -> subprocess.Popen[str]:
    """Start the real worker."""
    command = [sys.executable, "-m", "btm.merge.worker", str(spec_path)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)
