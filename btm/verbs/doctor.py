"""``btm doctor``: what this machine can run, with versions."""

import importlib.metadata
import json
import platform
import shutil
from typing import Any

from btm.config import Config
from btm.session import console_for
from btm.tables import rows_table
from launch.resources import available_cores, available_gpus, available_memory_bytes

_PACKAGES = {
    "torch": "training and scoring",
    "transformers": "model architectures",
    "ray": "launch=ray",
    "wandb": "tracking=wandb",
    "datasets": "Hugging Face datasets as input",
    "lm-eval": "lm-evaluation-harness on a forest",
    "deepspeed": "engine=deepspeed",
    "megatron-core": "engine=megatron",
}


def main(config: Config) -> None:
    """Print packages, cores, memory, GPUs and what follows from them."""
    facts = collect()
    if config.output_json:
        print(json.dumps(facts, indent=2))
        return
    packages = [(name, version or "missing", purpose) for name, version, purpose in facts["packages"]]
    rows = [*facts["machine"], *packages]
    console_for(config).print(rows_table(("what", "found", "used for"), rows, title="this machine"))


def collect() -> dict[str, Any]:
    """Facts about this machine as plain values."""
    import torch

    free = shutil.disk_usage(".").free
    machine = [
        ("Python", platform.python_version(), "at least 3.11"),
        ("cores", str(len(available_cores())), "one ELM per core by default: launch.cpus_per_elm"),
        ("GPUs", str(len(available_gpus())), "launch.gpus_per_elm"),
        ("memory free", f"{available_memory_bytes() / 1e9:.1f} GB", "training takes about 16 bytes per parameter"),
        ("CUDA in torch", str(torch.version.cuda or "no"), "GPU training"),
        ("bf16 on the CPU", torch.backends.cpu.get_cpu_capability(), "AMX or AVX512_BF16 makes engine.dtype=bf16 fast"),
        ("disk free here", f"{free / 1e9:.1f} GB", "checkpoints take 12 bytes per parameter each"),
    ]
    packages = [(name, _version(name), purpose) for name, purpose in _PACKAGES.items()]
    return {"machine": machine, "packages": packages}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
