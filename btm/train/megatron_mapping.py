"""Weights by Hugging Face names <-> the tensor-parallel slices that Megatron-Core holds. Pure functions.

Megatron has queries, keys and values in one matrix, ordered by key-value group (the queries of a group, its key, its
value), and gate and up projection in one, gate before up on every process. Attention heads, feed-forward columns and
vocabulary rows are shared out in equal parts (https://arxiv.org/abs/1909.08053); rows of padding are zero.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

import torch

from btm.train.megatron_shape import GptShape, QueryKeyNorm


class Cut(StrEnum):
    """How a weight is shared out among tensor-parallel processes."""

    copied = "copied"
    """Every process has all of it."""
    rows = "rows"
    vocabulary = "vocabulary"
    """Rows, with rows of zeros behind them."""
    columns = "columns"
    gate_up = "gate_up"
    """Rows of two matrices, or entries of two biases."""
    qkv = "qkv"
    """Rows of three matrices, or entries of three biases, by key-value group."""
    units = "units"
    """Last axis of a stack of matrices, one matrix for each expert."""


AXES = {Cut.rows: 0, Cut.columns: 1, Cut.units: 2}
"""Axis of a single tensor that is cut into equal parts."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One parameter of Megatron's and what it consists of."""

    name: str
    """In :class:`GPTModel`."""
    sources: tuple[str, ...]
    """Hugging Face names."""
    cut: Cut
    is_by_head: bool = False
    """Whether a copied weight meets only the process's own heads, so that its gradient there is one part of a sum."""
    is_repeated: bool = False
    """Whether every process computes the whole gradient of a copied weight, so that it counts once."""


def entries_of(shape: GptShape, *, is_sequence_parallel: bool = False) -> tuple[Entry, ...]:
    """Every parameter of the model but those of expert layers, in the order of the network.

    Args:
        shape: Of the model.
        is_sequence_parallel: Whether norms and biases meet a part of the sequence only.
    """
    rows = [Entry("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), Cut.vocabulary)]
    for number in range(shape.num_layers):
        rows += _block(shape, number)
    rows.append(Entry("decoder.final_layernorm.weight", ("model.norm.weight",), Cut.copied))
    if not shape.is_tied:
        rows.append(Entry("output_layer.weight", ("lm_head.weight",), Cut.vocabulary))
    return tuple(
        replace(row, is_repeated=row.cut is Cut.copied and not (row.is_by_head or is_sequence_parallel)) for row in rows
    )


def split(entry: Entry, tensors: Sequence[torch.Tensor], shape: GptShape, tensor_parallel: int) -> list[torch.Tensor]:
    """Slices of all tensor-parallel processes.

    Args:
        entry: What is split.
        tensors: Of ``entry.sources``.
        shape: Of the model.
        tensor_parallel: Number of processes; divides the heads, groups and feed-forward columns.

    Returns:
        Contiguous tensors, by process.
    """
    first = tensors[0]
    if entry.cut is Cut.copied:
        parts = (first,) * tensor_parallel
    elif entry.cut in AXES:
        parts = first.chunk(tensor_parallel, dim=AXES[entry.cut])
    elif entry.cut is Cut.vocabulary:
        padding = shape.padded_vocabulary(tensor_parallel) - first.shape[0]
        padded = torch.cat([first, first.new_zeros(padding, *first.shape[1:])]) if padding else first
        parts = padded.chunk(tensor_parallel)
    elif entry.cut is Cut.qkv:
        by_group = [tensor.unflatten(0, (shape.num_groups, -1)) for tensor in tensors]
        parts = [part.flatten(0, 1) for part in torch.cat(by_group, dim=1).chunk(tensor_parallel)]
    else:
        pieces = zip(*(tensor.chunk(tensor_parallel) for tensor in tensors), strict=True)
        parts = [torch.cat(piece) for piece in pieces]
    return [part.contiguous() for part in parts]


def join(entry: Entry, shards: Sequence[torch.Tensor], shape: GptShape) -> dict[str, torch.Tensor]:
    """The inverse of :func:`split`.

    Args:
        entry: What is joined.
        shards: Slices of all tensor-parallel processes in their order.
        shape: Of the model.

    Returns:
        Contiguous whole tensors by Hugging Face name.
    """
    if entry.cut is Cut.copied:
        whole = [shards[0]]
    elif entry.cut in AXES:
        whole = [torch.cat(list(shards), dim=AXES[entry.cut])]
    elif entry.cut is Cut.vocabulary:
        whole = [torch.cat(list(shards))[: shape.vocabulary]]
    elif entry.cut is Cut.qkv:
        by_group = torch.cat(list(shards)).unflatten(0, (shape.num_groups, -1))
        sizes = [shape.num_heads // shape.num_groups * shape.head_size, shape.head_size, shape.head_size]
        whole = [part.flatten(0, 1) for part in by_group.split(sizes, dim=1)]
    else:
        pieces = [shard.chunk(len(entry.sources)) for shard in shards]
        whole = [torch.cat(list(part)) for part in zip(*pieces, strict=True)]
    return {name: tensor.contiguous() for name, tensor in zip(entry.sources, whole, strict=True)}


def missing_names(entries: Sequence[Entry], names: Mapping[str, object]) -> list[str]:
    """Hugging Face names that only one side knows, sorted."""
    return sorted({source for entry in entries for source in entry.sources} ^ names.keys())


def _block(shape: GptShape, number: int) -> Iterator[Entry]:
    ours, theirs = f"decoder.layers.{number}", f"model.layers.{number}"
    attention, mlp = f"{ours}.self_attention", f"{ours}.mlp"
    theirs_mlp, theirs_attention = f"{theirs}.mlp", f"{theirs}.self_attn"
    behind = ".linear" if shape.has_post_norms else ""
    qkv = tuple(f"{theirs_attention}.{letter}_proj" for letter in "qkv")
    gate_up = (f"{theirs_mlp}.gate_proj", f"{theirs_mlp}.up_proj")
    is_dense = number not in shape.expert_blocks
    yield from _norms(shape, ours, theirs, "mlp.linear_fc2.norm" if is_dense else "mlp.norm")
    yield from _linear(f"{attention}.linear_qkv", qkv, Cut.qkv, Cut.qkv, shape.has_qkv_bias)
    projection = (f"{theirs_attention}.o_proj",)
    yield from _linear(
        f"{attention}.linear_proj{behind}", projection, Cut.columns, Cut.copied, shape.has_projection_bias
    )
    if is_dense:
        yield from _linear(f"{mlp}.linear_fc1", gate_up, Cut.gate_up, Cut.gate_up, shape.has_feed_forward_bias)
        down = (f"{theirs_mlp}.down_proj",)
        yield from _linear(f"{mlp}.linear_fc2{behind}", down, Cut.columns, Cut.copied, shape.has_feed_forward_bias)


def _linear(ours: str, theirs: Sequence[str], weight: Cut, bias: Cut, has_bias: bool) -> Iterator[Entry]:
    yield Entry(f"{ours}.weight", tuple(f"{name}.weight" for name in theirs), weight)
    if has_bias:
        yield Entry(f"{ours}.bias", tuple(f"{name}.bias" for name in theirs), bias)


def _norms(shape: GptShape, ours: str, theirs: str, behind_mlp: str) -> Iterator[Entry]:
    if shape.has_post_norms:
        pairs = {"self_attention.linear_proj.norm": "post_attention_layernorm"}
        pairs[behind_mlp] = "post_feedforward_layernorm"
    else:
        pairs = {"input_layernorm": "input_layernorm", "pre_mlp_layernorm": "post_attention_layernorm"}
    for our_name, their_name in pairs.items():
        yield Entry(f"{ours}.{our_name}.weight", (f"{theirs}.{their_name}.weight",), Cut.copied)
    if shape.query_key_norm is QueryKeyNorm.none:
        return
    is_by_head = shape.query_key_norm is QueryKeyNorm.head
    for letter in "qk":
        source = (f"{theirs}.self_attn.{letter}_norm.weight",)
        name = f"{ours}.self_attention.{letter}_layernorm.weight"
        yield Entry(name, source, Cut.copied if is_by_head else Cut.rows, is_by_head)
