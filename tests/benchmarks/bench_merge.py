"""Merging, process start included: ``btm merge``, mergekit's linear method, and plain torch.

``python tests/benchmarks/bench_merge.py`` writes forests of 8 random bf16 Llamas, of 268 MB and of 1.1 GB each, and
runs all contenders in turn as processes of their own. It prints seconds, ratios, the largest private memory
(``Private_Dirty`` of ``/proc/<pid>/smaps_rollup``), the load average, and whether ours and mergekit's weights are the
same bits. ``btm merge`` is the whole command: it reads the forest, checks every input against its recorded checksum
(mergekit checks nothing) and writes a model with tokenizer and card; its worker alone, checking nothing, is printed
beside it. mergekit comes with the extra ``bench``. Files are read from the page cache (warm) unless ``--cold``.
"""

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from speed_table import Line, close

from btm.config_parse import parse_config
from btm.forest import Forest
from btm.merge.tensor_file import format_header, read_tensors
from btm.records import ElmRecord, Ledger
from btm.requests import MergeInput, MergeSpec
from btm.session import store_config

VOCABULARY = 32_000
OURS, MERGEKIT = "btm merge", "mergekit linear"
LIMITS = {134: (3.0, 8.0), 551: (2.0, 5.0)}
"""Millions of parameters -> floor and goal of the ratio to mergekit."""
MEMORY_MB = 256
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


def make_forest(folder: Path, options: argparse.Namespace, num_parameters: int) -> Forest:
    """A forest of random models, as ``btm run`` leaves it."""
    config, shapes = llama_shapes(num_parameters)
    names = [f"part{index}" for index in range(options.models)]
    forest = Forest.create(folder / "forest", name="bench", tokenizer_sha256="bench", vocab_size=VOCABULARY)
    tokenizer = json.dumps({"version": "1.0", "model": {"type": "BPE", "vocab": {}}})
    forest.tokenizer_dir.mkdir()
    (forest.tokenizer_dir / "tokenizer.json").write_text(tokenizer)
    (folder / "text.jsonl").write_text("{}")
    domains = {name: str(folder / "text.jsonl") for name in names}
    store_config(parse_config({"forest": str(forest.path), "data": {"domains": domains}}))
    for seed, name in enumerate(names):
        # Inside the forest, where files are linked and not copied.
        directory = forest.path / "runs" / name
        write_random_model(directory, config, shapes, seed)
        (directory / "tokenizer.json").write_text(tokenizer)
        record = ElmRecord(
            domain=name, directory="", parents=[], ledger=Ledger(), data_fingerprint="", files={},
            num_parameters=num_parameters, created="2000-01-01T00:00:00+00:00",
        )  # fmt: skip
        forest.join(record, directory)
        shutil.rmtree(directory)
    return forest


def write_random_model(
    directory: Path, config: dict[str, object], shapes: dict[str, tuple[int, ...]], seed: int
) -> None:
    """Random bf16 weights of the size of trained ones."""
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(config))
    values = np.random.default_rng(seed).standard_normal(1 << 23, dtype=np.float32) * np.float32(0.02)
    pool = (values.view(np.uint32) >> np.uint32(16)).astype(np.uint16)
    with open(directory / "model.safetensors", "wb") as file:
        file.write(format_header([(name, "BF16", shapes[name]) for name in sorted(shapes)], {"format": "pt"}))
        for number, name in enumerate(sorted(shapes)):
            # Drawn once and repeated from another place on: how fast bytes are averaged is the same for all of them.
            file.write(np.resize(np.roll(pool, 4099 * number), shapes[name]).tobytes())


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


def contenders(folder: Path, forest: Forest, *, is_small: bool) -> dict[str, list[str]]:
    """Name -> command; each writes ``folder/out-<n>``."""
    python = sys.executable
    models = [forest.directory(name) for name in forest.domains]
    whole = [str(Path(python).with_name("btm")), "merge", f"forest={forest.path}"]
    commands = {OURS: [*whole, f"merge.output={folder / 'out-btm'}"]}
    spec = MergeSpec(
        name="bench",
        method="uniform",  # pyright: ignore[reportArgumentType]
        models=[MergeInput(name=model.name, directory=str(model)) for model in models],
        tokenizer_dir=str(forest.tokenizer_dir),
        output_dir=str(folder / "out-worker"),
    )
    spec.save(folder / "spec.json")
    commands["its worker alone, nothing checked"] = [python, "-m", "btm.merge.worker", str(folder / "spec.json")]
    mergekit = shutil.which("mergekit-yaml", path=f"{Path(python).parent}:{os.environ['PATH']}")
    if mergekit:
        recipe = [{"model": str(model), "parameters": {"weight": 1.0}} for model in models]
        path = folder / "linear.yml"
        path.write_text(json.dumps({"models": recipe, "merge_method": "linear", "dtype": "bfloat16"}))
        commands[MERGEKIT] = [mergekit, str(path), str(folder / "out-mergekit"), "--quiet", "--no-copy-tokenizer"]
    if is_small:
        # Holds all models at once: not for the large ones.
        commands["plain torch"] = [python, "-c", NAIVE_TORCH, *map(str, models), str(folder / "out-torch")]
    return commands


def main() -> None:
    """Measure each size and print all figures."""
    options = _options()
    lines = [line for millions in options.parameters for line in bench_size(options, millions)]
    close(lines)
    if not any(line.figure for line in lines[::2]):
        sys.exit("mergekit is not installed: make bench installs it, or pip install -e '.[bench]'")


def bench_size(options: argparse.Namespace, millions: int) -> list[Line]:
    """Write models of one size, measure in turn, clean up."""
    with tempfile.TemporaryDirectory(prefix="bench-merge-", dir=options.directory) as scratch:
        folder = Path(scratch)
        forest = make_forest(folder, options, millions * 1_000_000)
        models = [forest.directory(name) for name in forest.domains]
        size = (models[0] / "model.safetensors").stat().st_size
        is_small = millions <= min(LIMITS)
        rounds = options.rounds if is_small else max(1, options.rounds - 1)
        state = "cold" if options.cold else "warm"
        print(f"\n{len(models)} models of {size / 1e6:.0f} MB bf16, {state}, load {os.getloadavg()[0]:.2f}")
        commands = contenders(folder, forest, is_small=is_small)
        seconds: dict[str, list[float]] = {name: [] for name in commands}
        memory = dict.fromkeys(commands, 0.0)
        for number in range(rounds + 1):
            for name, command in commands.items():
                _prepare(folder, models, cold=options.cold)
                taken, private = run_measured(command)
                if number:
                    seconds[name].append(taken)
                    memory[name] = max(memory[name], private)
                if number == 0 and name == OURS:
                    ours = _bytes_of(folder / "out-btm")
                if number == 0 and name == MERGEKIT:
                    print(f"same bits as {MERGEKIT}: {'yes' if ours == _bytes_of(folder / 'out-mergekit') else 'NO'}")
        _report(seconds, memory)
    floor, goal = LIMITS.get(millions, (None, None))
    ratio = _ratio(seconds[MERGEKIT], seconds[OURS]) if MERGEKIT in seconds else None
    named = f"{options.models} x {size / 1e6:.0f} MB"
    return [
        Line(what=f"merge {named}: {MERGEKIT} / {OURS}, process start included", figure=ratio, floor=floor, goal=goal),
        Line(
            what=f"merge {named}: private memory",
            figure=memory[OURS], floor=MEMORY_MB, goal=MEMORY_MB, at_most=True, unit="MB",
        ),
    ]  # fmt: skip


def _bytes_of(directory: Path) -> dict[str, int]:
    """Hash of the bytes of every tensor in a directory."""
    found = {}
    for path in directory.glob("*.safetensors"):
        data = np.memmap(path, dtype=np.uint8, mode="r")
        for name, tensor in read_tensors(path).items():
            found[name] = hash(data[tensor.offset : tensor.offset + tensor.num_bytes].tobytes())
    return found


def _ratio(theirs: list[float], ours: list[float]) -> float:
    return statistics.median(other / own for other, own in zip(theirs, ours, strict=True))


def _report(seconds: dict[str, list[float]], memory: dict[str, float]) -> None:
    ours, *_ = seconds
    for name, taken in seconds.items():
        print(
            f"{name:<42} {statistics.median(taken):6.2f} s (best {min(taken):5.2f})  "
            f"{_ratio(taken, seconds[ours]):5.2f} times {ours}  {memory[name]:6.0f} MB private"
        )
    print(f"load average {os.getloadavg()[0]:.2f} at the end")


def _prepare(folder: Path, models: list[Path], *, cold: bool) -> None:
    for output in folder.glob("out-*"):
        if output.is_dir():
            shutil.rmtree(output)
        else:
            output.unlink()
    for model in models if cold else []:
        descriptor = os.open(model / "model.safetensors", os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parameters", type=int, nargs="+", default=list(LIMITS), help="millions per model")
    parser.add_argument("--models", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3, help="after one of warm-up; one less for large models")
    parser.add_argument("--directory", default=None, help="where the models are written (up to 11 GB)")
    parser.add_argument("--cold", action="store_true", help="drop the inputs from the page cache before each run")
    parser.add_argument("--quick", action="store_true", help="two small models, one round")
    options = parser.parse_args()
    if options.quick:
        options.parameters, options.models, options.rounds = [10], 2, 1
    return options


if __name__ == "__main__":
    main()
