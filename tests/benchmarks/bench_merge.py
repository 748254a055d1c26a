"""Merging, process start included: ours, mergekit's linear method where it is installed, and plain torch.

``python tests/benchmarks/bench_merge.py --parameters 134 --models 8`` writes random bf16 Llamas of 134 million
parameters, runs all contenders in turn as processes of their own, and prints seconds, ratios, the largest private
memory (``Private_Dirty`` of ``/proc/<pid>/smaps_rollup``) and the load average. Files are read from the page cache
(warm) unless ``--cold``. Higher ratios are better.
"""

import argparse
import hashlib
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import xxhash

from btm.merge.tensor_file import format_header
from btm.requests import MergeInput, MergeSpec

VOCABULARY = 32_000
OURS = {
    "btm merge": "",
    "btm merge, XXH3 of all inputs checked": "checksums",
    "btm merge, SHA-256 of all inputs checked": "files",
}
"""Contender -> field of the request that holds the hashes."""
NAIVE_TORCH = """
import sys, torch
from pathlib import Path
from safetensors.torch import load_file, save_file
*models, output = map(Path, sys.argv[1:])
states = [load_file(model / "model.safetensors") for model in models]
mean = {name: (sum(state[name].float() for state in states) / len(states)).bfloat16() for name in states[0]}
output.mkdir()
save_file(mean, output / "model.safetensors", metadata={"format": "pt"})
"""


def llama_shapes(num_parameters: int) -> tuple[dict[str, object], dict[str, tuple[int, ...]]]:
    """Config and tensors of a Llama of at least this size; depth grows with width."""
    width = 128
    while _count(width) < num_parameters:
        width += 64
    layers, inner = _layers(width), 4 * width
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, width)}
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        shapes |= {prefix + f"self_attn.{name}_proj.weight": (width, width) for name in "qkvo"}
        shapes |= {prefix + f"mlp.{name}_proj.weight": (inner, width) for name in ("gate", "up")}
        shapes |= {prefix + "mlp.down_proj.weight": (width, inner)}
        shapes |= {prefix + f"{name}_layernorm.weight": (width,) for name in ("input", "post_attention")}
    shapes["model.norm.weight"] = (width,)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": width // 64,
        "num_key_value_heads": width // 64,
        "vocab_size": VOCABULARY,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
    }
    return config, shapes


def write_random_model(
    directory: Path, config: dict[str, object], shapes: dict[str, tuple[int, ...]], seed: int
) -> str:
    """Random bf16 weights of the size of trained ones; returns the SHA-256 of the file."""
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "tokenizer.json").write_text(json.dumps({"version": "1.0", "model": {"type": "BPE", "vocab": {}}}))
    generator, names = np.random.default_rng(seed), sorted(shapes)
    digests = {"files": hashlib.sha256(), "checksums": xxhash.xxh3_128()}
    with open(directory / "model.safetensors", "wb") as file:
        header = format_header([(name, "BF16", shapes[name]) for name in names], {"format": "pt"})
        _write(file, header, digests)
        for name in names:
            values = generator.standard_normal(shapes[name], dtype=np.float32) * np.float32(0.02)
            data = (values.view(np.uint32) >> np.uint32(16)).astype(np.uint16).tobytes()
            _write(file, data, digests)
    return {kind: digest.hexdigest() for kind, digest in digests.items()}


def run_measured(command: list[str]) -> tuple[float, float]:
    """Seconds from start to end of a process, and the most private memory seen, in MB."""
    began, peak = time.perf_counter(), 0
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    while True:
        peak = max(peak, _private_kb(process.pid))
        try:
            process.wait(0.02)
            break
        except subprocess.TimeoutExpired:
            continue
    seconds = time.perf_counter() - began
    if process.returncode:
        raise RuntimeError(f"{command[0]} failed: {process.stderr.read().decode()[-2000:] if process.stderr else ''}")
    return seconds, peak / 1024


def contenders(folder: Path, models: list[Path], hashes: list[dict[str, str]]) -> dict[str, list[str]]:
    """Name -> command; each writes ``folder/out-<n>``."""
    python, commands = sys.executable, {}
    for name, record in OURS.items():
        spec = MergeSpec(
            name="bench",
            method="uniform",  # pyright: ignore[reportArgumentType]
            models=[
                MergeInput(
                    name=model.name,
                    directory=str(model),
                    **{kind: {"model.safetensors": model_hashes[kind]} for kind in [record] if kind},
                )
                for model, model_hashes in zip(models, hashes, strict=True)
            ],
            tokenizer_dir=str(models[0]),
            output_dir=str(folder / f"out-{len(commands)}"),
        )
        path = folder / f"spec-{len(commands)}.json"
        spec.save(path)
        commands[name] = [python, "-m", "btm.merge.worker", str(path)]
    mergekit = shutil.which("mergekit-yaml", path=f"{Path(python).parent}:{os.environ['PATH']}")
    if mergekit:
        recipe = [{"model": str(model), "parameters": {"weight": 1.0}} for model in models]
        path = folder / "linear.yml"
        path.write_text(json.dumps({"models": recipe, "merge_method": "linear", "dtype": "bfloat16"}))
        commands["mergekit linear"] = [
            mergekit,
            str(path),
            str(folder / "out-mergekit"),
            "--quiet",
            "--no-copy-tokenizer",
        ]
    commands["plain torch"] = [python, "-c", NAIVE_TORCH, *map(str, models), str(folder / "out-torch")]
    return commands


def main() -> None:
    """Write models, measure in turn, print, clean up."""
    options = _options()
    with tempfile.TemporaryDirectory(prefix="bench-merge-", dir=options.directory) as scratch:
        folder = Path(scratch)
        config, shapes = llama_shapes(options.parameters * 1_000_000)
        models = [folder / f"model-{index}" for index in range(options.models)]
        hashes = [write_random_model(model, config, shapes, seed) for seed, model in enumerate(models)]
        size = (models[0] / "model.safetensors").stat().st_size
        state = "cold" if options.cold else "warm"
        print(f"{len(models)} models of {size / 1e6:.0f} MB bf16, {state}, load {os.getloadavg()[0]:.2f}")
        commands = contenders(folder, models, hashes)
        seconds: dict[str, list[float]] = {name: [] for name in commands}
        memory = dict.fromkeys(commands, 0.0)
        for number in range(options.rounds + 1):
            for name, command in commands.items():
                _prepare(folder, models, cold=options.cold)
                taken, private = run_measured(command)
                if number:
                    seconds[name].append(taken)
                    memory[name] = max(memory[name], private)
        _report(seconds, memory)


def _report(seconds: dict[str, list[float]], memory: dict[str, float]) -> None:
    ours, *_ = seconds
    for name, taken in seconds.items():
        ratios = [other / own for other, own in zip(taken, seconds[ours], strict=True)]
        print(
            f"{name:<42} {statistics.median(taken):6.2f} s (best {min(taken):5.2f})  "
            f"{statistics.median(ratios):5.2f} times {ours}  {memory[name]:6.0f} MB private"
        )
    print(f"load average {os.getloadavg()[0]:.2f} at the end")


def _prepare(folder: Path, models: list[Path], *, cold: bool) -> None:
    for output in folder.glob("out-*"):
        if output.is_dir():
            shutil.rmtree(output)
    for model in models if cold else []:
        descriptor = os.open(model / "model.safetensors", os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def _write(file: BinaryIO, data: bytes, digests: Mapping[str, Any]) -> None:
    file.write(data)
    for digest in digests.values():
        digest.update(data)


def _private_kb(pid: int) -> int:
    try:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except (OSError, ValueError):
        return 0
    found = re.search(r"Private_Dirty: +(\d+)", text)
    return int(found[1]) if found else 0


def _layers(width: int) -> int:
    return max(2, width // 64)


def _count(width: int) -> int:
    return VOCABULARY * width + _layers(width) * 16 * width * width


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("--parameters", type=int, default=134, help="millions per model")
    parser.add_argument("--models", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--directory", default=None, help="where the models are written (several GB)")
    parser.add_argument("--cold", action="store_true", help="drop the inputs from the page cache before each run")
    return parser.parse_args()


if __name__ == "__main__":
    main()
