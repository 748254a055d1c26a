"""A Hugging Face model directory as data: its config, its tokenizer files and where each tensor's bytes are."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from btm.errors import MergeError
from btm.merge.tensor_file import Tensor, read_tensors
from btm.records import TOKENIZER_FILES

WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
CONFIG_NAME = "config.json"
GENERATION_CONFIG_NAME = "generation_config.json"
_VOCABULARY_NAMES = ("tokenizer.json", "tokenizer.model", "vocab.json")
_MAX_JSON_BYTES = 256 << 20
_PICKLE_SUFFIXES = {".bin", ".pt", ".pth", ".ckpt", ".pkl"}


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """One model that goes into an average."""

    name: str
    directory: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    """Without copies of tied weights."""

    @property
    def weight_files(self) -> list[Path]:
        """The safetensors files, each once."""
        return sorted({tensor.path for tensor in self.tensors.values()})


def open_model(name: str, directory: Path) -> ModelFiles:
    """Read config and tensor headers of a directory as ``save_pretrained`` writes it, one file or sharded.

    Raises:
        MergeError: If it is no such directory, holds its weights only as pickles, needs code of its own, or is damaged.
    """
    if not directory.is_dir():
        raise MergeError(f"model {name!r}: {directory} is not a directory; give a Hugging Face model directory")
    config = read_json_object(directory / CONFIG_NAME)
    if "auto_map" in config:
        raise MergeError(
            f"{directory / CONFIG_NAME} asks for code of its own (auto_map), which is never run; use an architecture "
            f"that transformers knows"
        )
    single, index = directory / WEIGHTS_NAME, directory / INDEX_NAME
    if single.is_file():
        tensors = read_tensors(single)
    elif index.is_file():
        tensors = _read_shards(index)
    else:
        raise MergeError(_no_weights(directory))
    if not tensors:
        raise MergeError(f"{directory} holds no tensor; give a directory written by save_pretrained")
    return ModelFiles(name, directory, config, tensors)


def read_json_object(path: Path) -> dict[str, Any]:
    """Read one JSON object of bounded size.

    Raises:
        MergeError: If the file is missing, too large or not a JSON object.
    """
    if not path.is_file():
        raise MergeError(f"{path.parent} has no {path.name}; give a directory written by save_pretrained")
    if path.stat().st_size > _MAX_JSON_BYTES:
        raise MergeError(f"{path} has {path.stat().st_size} bytes, allowed are {_MAX_JSON_BYTES}")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise MergeError(f"{path} is not valid JSON ({str(error)[:200]}); restore it from a copy") from None
    if not isinstance(value, dict):
        raise MergeError(f"{path} must hold a JSON object, got {type(value).__name__}; restore it from a copy")
    return value


def tokenizer_files(directory: Path) -> list[Path]:
    """The tokenizer's files that ``directory`` holds."""
    return [directory / name for name in TOKENIZER_FILES if (directory / name).is_file()]


def vocabulary_file(directory: Path) -> Path | None:
    """The file that holds the tokenizer's vocabulary, None when ``directory`` has no tokenizer."""
    return next((directory / name for name in _VOCABULARY_NAMES if (directory / name).is_file()), None)


def _read_shards(index: Path) -> dict[str, Tensor]:
    places = read_json_object(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
        raise MergeError(f"{index} must map tensor names to file names under weight_map; restore it from a copy")
    tensors: dict[str, Tensor] = {}
    for file_name in sorted(set(places.values())):
        if Path(file_name).name != file_name or not file_name.endswith(".safetensors"):
            raise MergeError(f"{index} names {file_name!r}; only .safetensors files of the same directory are read")
        for name, tensor in read_tensors(index.parent / file_name).items():
            if places.get(name) != file_name:
                raise MergeError(f"{index} places tensor {name!r} in {places.get(name)!r}, but {file_name!r} holds it")
            tensors[name] = tensor
    missing = sorted(set(places) - set(tensors))
    if missing:
        raise MergeError(f"{index} names tensor {missing[0]!r} in {places[missing[0]]!r}, which does not hold it")
    return tensors


def _no_weights(directory: Path) -> str:
    pickles = sorted(path.name for path in directory.iterdir() if path.suffix in _PICKLE_SUFFIXES)
    if not pickles:
        return f"{directory} has no {WEIGHTS_NAME}; give a directory written by save_pretrained"
    return (
        f"{directory} has its weights only as pickles ({', '.join(pickles[:3])}), which can run code when they are "
        f"read; convert them where you trust them: AutoModelForCausalLM.from_pretrained(...).save_pretrained(...)"
    )
