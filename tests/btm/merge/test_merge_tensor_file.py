"""Reading safetensors headers: every sound file is understood, every hostile one is refused (R12)."""

import json
import random

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from btm.errors import MergeError
from btm.merge.tensor_file import MAX_HEADER_BYTES, format_header, read_tensors


def raw_file(path, header, payload=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + payload)
    return path


def entry(begin, end, shape, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def test_reads_what_safetensors_writes(tmp_path):
    tensors = {
        "b": torch.arange(6, dtype=torch.bfloat16).reshape(2, 3),
        "a": torch.ones(4),
        "scalar": torch.tensor(7),
        "empty": torch.zeros(0, 5),
        "flag": torch.tensor([True, False]),
    }
    path = tmp_path / "x.safetensors"
    save_file(tensors, path, metadata={"format": "pt"})
    found = read_tensors(path)
    assert {name: tensor.shape for name, tensor in found.items()} == {n: tuple(t.shape) for n, t in tensors.items()}
    content = path.read_bytes()
    for name, tensor in tensors.items():
        place = found[name]
        assert content[place.offset : place.offset + place.num_bytes] == bytes(tensor.reshape(-1).view(torch.uint8))


def test_safetensors_reads_what_we_write(tmp_path):
    header = format_header([("w", "F32", (2, 2)), ("n", "I64", ())], {"format": "pt"})
    path = tmp_path / "x.safetensors"
    path.write_bytes(header + torch.arange(4.0).numpy().tobytes() + (5).to_bytes(8, "little"))
    assert len(header) % 64 == 0
    loaded = load_file(path)
    assert torch.equal(loaded["w"], torch.arange(4.0).reshape(2, 2))
    assert loaded["n"].item() == 5
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt"}


HOSTILE = {
    "empty file": (None, b""),
    "header bomb": ({"length": 2**63}, b"{}"),
    "header longer than the limit": ({"length": MAX_HEADER_BYTES + 1}, b"{}"),
    "header longer than the file": ({"length": 999}, b"{}"),
    "not JSON": ({}, b"{nonsense"),
    "not UTF-8": ({}, b'{"\xff\xfe": 1}'),
    "deep nesting": ({}, b"[" * 100_000),
    "huge number": ({}, b'{"a":{"dtype":"F32","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,4]}}'),
    "a list": ({}, b"[]"),
    "a name twice": ({"payload": 4}, b'{"a":%s,"a":%s}' % ((json.dumps(entry(0, 4, [1])).encode(),) * 2)),
    "entry is no object": ({}, {"a": 3}),
    "missing field": ({}, {"a": {"dtype": "F32", "shape": [1]}}),
    "extra field": ({"payload": 4}, {"a": {**entry(0, 4, [1]), "load": "os.system"}}),
    "unknown dtype": ({"payload": 1}, {"a": entry(0, 1, [1], "F8_E4M3")}),
    "dtype is a list": ({"payload": 4}, {"a": entry(0, 4, [1], ["F32"])}),
    "negative size": ({}, {"a": entry(0, 4, [-1])}),
    "float size": ({"payload": 4}, {"a": entry(0, 4, [1.0])}),
    "bool size": ({"payload": 4}, {"a": entry(0, 4, [True])}),
    "size overflow": ({}, {"a": entry(0, 0, [2**40, 2**40])}),
    "too many dimensions": ({"payload": 4}, {"a": entry(0, 4, [1] * 65)}),
    "three offsets": ({"payload": 4}, {"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4, 8]}}),
    "negative offset": ({"payload": 4}, {"a": entry(-4, 0, [1])}),
    "end before begin": ({"payload": 4}, {"a": entry(4, 0, [1])}),
    "bytes contradict shape": ({"payload": 8}, {"a": entry(0, 8, [1])}),
    "beyond the file": ({"payload": 4}, {"a": entry(0, 400, [100])}),
    "overlap": ({"payload": 8}, {"a": entry(0, 8, [2]), "b": entry(4, 8, [1])}),
    "gap": ({"payload": 12}, {"a": entry(0, 4, [1]), "b": entry(8, 12, [1])}),
    "hole at the start": ({"payload": 8}, {"a": entry(4, 8, [1])}),
    "bytes behind the last tensor": ({"payload": 8}, {"a": entry(0, 4, [1])}),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_headers_are_refused(tmp_path, case):
    options, header = HOSTILE[case]
    path = tmp_path / "x.safetensors"
    if options is None:
        path.write_bytes(header)
    else:
        raw_file(path, header, bytes(options.get("payload", 0)), options.get("length"))
    with pytest.raises(MergeError, match=r"x\.safetensors"):
        read_tensors(path)


def test_damaged_headers_never_crash_the_reader(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file({f"t{index}": torch.ones(3, 4) for index in range(5)}, path)
    sound, generator, refused = path.read_bytes(), random.Random(0), 0
    header_bytes = 8 + int.from_bytes(sound[:8], "little")
    for _ in range(300):
        damaged = bytearray(sound)
        damaged[generator.randrange(header_bytes)] ^= 1 << generator.randrange(8)
        path.write_bytes(damaged[: generator.choice([len(sound), generator.randrange(len(sound))])])
        try:
            read_tensors(path)
        except MergeError:
            refused += 1
    assert refused > 200


def test_a_directory_or_missing_file_is_named(tmp_path):
    with pytest.raises(MergeError, match="missing or not a regular file"):
        read_tensors(tmp_path)
