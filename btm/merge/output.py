"""Write an average as a Hugging Face directory that loads as it is."""

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from btm.errors import MergeError
from btm.merge.average import canonical_order, plan_runs, write_tensors
from btm.merge.model_files import (
    CONFIG_NAME,
    GENERATION_CONFIG_NAME,
    INDEX_NAME,
    WEIGHTS_NAME,
    ModelFiles,
    tokenizer_files,
)
from btm.merge.tensor_file import format_header

SHARD_BYTES = 5 << 30
"""Weights above this are written as several files."""
_RESERVE_BYTES = 64 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class StreamOptions:
    """How to stream; none of it changes a value."""

    memory_bytes: int
    """Bound on all buffers together."""
    num_threads: int
    shard_bytes: int = SHARD_BYTES
    """Largest file of weights, except for a single larger tensor."""


def write_weights(
    models: Sequence[ModelFiles], weights: Sequence[float], folder: Path, options: StreamOptions
) -> dict[str, str]:
    """Write the weighted average into ``folder``: one file, or shards and their index.

    Args:
        models: Compatible models with positive weights, in the order of accumulation.
        weights: One per model, sum 1.
        folder: An existing directory.
        options: Memory, threads, size of the files.

    Returns:
        Name of each file of weights -> SHA-256.

    Raises:
        MergeError: If the disk is too full, or a model's values cannot be averaged.
    """
    tensors = models[0].tensors
    _check_space(folder, sum(tensor.num_bytes for tensor in tensors.values()))
    shards = _split(models[0], options.shard_bytes)
    names = [WEIGHTS_NAME]
    if len(shards) > 1:
        names = [f"model-{index + 1:05d}-of-{len(shards):05d}.safetensors" for index in range(len(shards))]
    hashes = {}
    for file_name, shard in zip(names, shards, strict=True):
        header = format_header([(n, tensors[n].dtype, tensors[n].shape) for n in shard], {"format": "pt"})
        hashes[file_name] = write_tensors(
            folder / file_name,
            header,
            plan_runs(shard, models),
            weights,
            memory_bytes=options.memory_bytes,
            num_threads=options.num_threads,
        )
    if len(shards) > 1:
        (folder / INDEX_NAME).write_text(_index(models[0], dict(zip(names, shards, strict=True))), encoding="utf-8")
    return hashes


def write_companions(model: ModelFiles, tokenizer_dir: Path | None, folder: Path) -> None:
    """Write config, generation config and tokenizer beside the weights.

    Args:
        model: Whose config is taken.
        tokenizer_dir: Whose tokenizer is taken; None takes the model's, if it has one.
        folder: An existing directory.

    Raises:
        MergeError: If ``tokenizer_dir`` holds no tokenizer.
    """
    config = {key: value for key, value in model.config.items() if key != "_name_or_path"}
    (folder / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    generation = model.directory / GENERATION_CONFIG_NAME
    if generation.is_file():
        shutil.copyfile(generation, folder / generation.name)
    files = tokenizer_files(tokenizer_dir or model.directory)
    if tokenizer_dir is not None and not files:
        raise MergeError(f"{tokenizer_dir} holds no tokenizer (tokenizer.json); name the forest's tokenizer directory")
    for file in files:
        shutil.copyfile(file, folder / file.name)


def _split(model: ModelFiles, shard_bytes: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    used = 0
    for name in canonical_order(model.tensors):
        size = model.tensors[name].num_bytes
        if shards[-1] and used + size > shard_bytes:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used += size
    return shards


def _index(model: ModelFiles, shards: Mapping[str, Sequence[str]]) -> str:
    places = {name: file_name for file_name, names in shards.items() for name in names}
    total = sum(tensor.num_bytes for tensor in model.tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
    return json.dumps(index, indent=2) + "\n"


def _check_space(folder: Path, num_bytes: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < num_bytes + _RESERVE_BYTES:
        raise MergeError(
            f"the merged model needs {num_bytes + _RESERVE_BYTES} bytes in {folder.parent}, but only {free} are free; "
            f"free some space or choose another output"
        )
