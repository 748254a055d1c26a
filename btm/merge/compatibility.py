"""Whether models can be averaged at all; every error names both sides, what differs and both values."""

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from btm.errors import MergeError
from btm.merge.model_files import CONFIG_NAME, ModelFiles, read_json_object, vocabulary_file
from btm.merge.tensor_file import Tensor

_CONFIG_IGNORED = frozenset({
    "_name_or_path",
    "_commit_hash",
    "transformers_version",
    "torch_dtype",
    "dtype",
    "use_cache",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "initializer_range",
})  # fmt: skip
_CONFIG_IGNORED_ENDINGS = ("dropout", "pdrop")
_HEAD_NAMES = ("lm_head.weight", "embed_out.weight")
_EMBEDDING_NAMES = ("embed_tokens.weight", "wte.weight", "embed_in.weight", "word_embeddings.weight")
_COMPARE_BYTES = 1 << 20


def without_tied_copies(model: ModelFiles) -> ModelFiles:
    """Leave out the output head where the config ties it to the embeddings and the file holds both.

    Raises:
        MergeError: If the two differ.
    """
    if not model.config.get("tie_word_embeddings"):
        return model
    head = next((name for name in model.tensors if name in _HEAD_NAMES), None)
    embedding = next((name for name in model.tensors if name.endswith(_EMBEDDING_NAMES)), None)
    if head is None or embedding is None:
        return model
    if not _same_content(model.tensors[head], model.tensors[embedding]):
        raise MergeError(
            f"{model.directory}: {CONFIG_NAME} ties {head!r} to {embedding!r} (tie_word_embeddings), but the two hold "
            f"different values; set tie_word_embeddings to false or store the model again with save_pretrained"
        )
    return replace(model, tensors={name: tensor for name, tensor in model.tensors.items() if name != head})


def check_compatible(models: Sequence[ModelFiles]) -> None:
    """Compare every model with the first: config, names, shapes and types of tensors.

    Raises:
        MergeError: Naming both directories, what differs and both values.
    """
    first = models[0]
    for other in models[1:]:
        _check_configs(first, other)
        _check_tensors(first, other)


def check_tokenizers(directories: Sequence[Path]) -> None:
    """Compare the vocabularies of all directories that hold a tokenizer.

    Raises:
        MergeError: Naming two files that differ and the first difference.
    """
    files = [file for directory in directories if (file := vocabulary_file(directory)) is not None]
    for file in files[1:]:
        if file.name == files[0].name and (difference := _tokenizer_difference(files[0], file)):
            raise MergeError(
                f"the tokenizers {files[0]} and {file} differ: {difference}; models with different tokenizers cannot "
                f"be averaged"
            )


def _check_configs(first: ModelFiles, other: ModelFiles) -> None:
    for key in sorted(set(first.config) & set(other.config) - _CONFIG_IGNORED):
        if first.config[key] != other.config[key] and not key.endswith(_CONFIG_IGNORED_ENDINGS):
            raise MergeError(
                f"{first.directory / CONFIG_NAME} and {other.directory / CONFIG_NAME} differ in {key}: "
                f"{_short(first.config[key])} and {_short(other.config[key])}; only models of one architecture and "
                f"vocabulary can be averaged"
            )


def _check_tensors(first: ModelFiles, other: ModelFiles) -> None:
    for one, two in ((first, other), (other, first)):
        missing = sorted(set(one.tensors) - set(two.tensors))
        if missing:
            raise MergeError(
                f"tensor {missing[0]!r} is in {one.tensors[missing[0]].path} but not in {two.directory} "
                f"({len(missing)} missing); only models of one architecture can be averaged"
            )
    for name, tensor in first.tensors.items():
        twin = other.tensors[name]
        if tensor.shape != twin.shape:
            raise MergeError(_tensor_mismatch(name, tensor, twin, "shape", str(tensor.shape), str(twin.shape)))
        if tensor.dtype != twin.dtype:
            raise MergeError(_tensor_mismatch(name, tensor, twin, "dtype", tensor.dtype, twin.dtype))


def _tensor_mismatch(name: str, one: Tensor, two: Tensor, what: str, value: str, other: str) -> str:
    remedy = "store both in one type" if what == "dtype" else "only models of one architecture can be averaged"
    return f"tensor {name!r} has {what} {value} in {one.path} and {other} in {two.path}; {remedy}"


def _tokenizer_difference(one: Path, two: Path) -> str:
    if one.stat().st_size == two.stat().st_size and one.read_bytes() == two.read_bytes():
        return ""
    if one.suffix != ".json":
        return "their bytes"
    left, right = (_flat_tokenizer(read_json_object(path)) for path in (one, two))
    for key in sorted(set(left) | set(right)):
        if left.get(key) != right.get(key):
            return f"{key} is {_short(left.get(key))} and {_short(right.get(key))}"
    return ""


def _flat_tokenizer(content: dict[str, Any]) -> dict[str, Any]:
    """What decides the ids of a text, one entry per token of the vocabulary; not padding and truncation."""
    model = content.get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else content
    flat = {key: content.get(key) for key in ("added_tokens", "normalizer", "pre_tokenizer")}
    if isinstance(vocabulary, dict):
        flat |= {f"token {token!r}": index for token, index in vocabulary.items()}
    elif isinstance(vocabulary, list):
        flat |= {f"entry {index}": entry for index, entry in enumerate(vocabulary)}
    if isinstance(model, dict):
        flat |= {"type": model.get("type"), "merges": _merge_pairs(model.get("merges"))}
    return flat


def _merge_pairs(merges: Any) -> list[Any]:
    """Merges in one form; older files write a pair as text with a space."""
    pairs = merges if isinstance(merges, list) else []
    return [pair.split(" ", 1) if isinstance(pair, str) else pair for pair in pairs]


def _same_content(one: Tensor, two: Tensor) -> bool:
    if (one.shape, one.dtype) != (two.shape, two.dtype):
        return False
    with open(one.path, "rb", buffering=0) as left, open(two.path, "rb", buffering=0) as right:
        for begin in range(0, one.num_bytes, _COMPARE_BYTES):
            count = min(_COMPARE_BYTES, one.num_bytes - begin)
            if os.pread(left.fileno(), count, one.offset + begin) != os.pread(
                right.fileno(), count, two.offset + begin
            ):
                return False
    return True


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
