"""The engine: exact where it can be exact, the same bytes on every way, and bad values found by name."""

import itertools
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import hashes, merge, spec_for, write_model

from btm.errors import MergeError
from btm.merge.worker import merge_models, run_spec

FLOATS = [torch.bfloat16, torch.float16, torch.float32, torch.float64]


def awkward(dtype, count, seed=0):
    """Random values of all magnitudes, with both zeros, subnormals and the largest numbers."""
    generator = torch.Generator().manual_seed(seed)
    info = torch.finfo(dtype)
    values = torch.randn(count, generator=generator, dtype=torch.float64)
    values *= 10.0 ** torch.randint(-6, 3, (count,), generator=generator).double()
    special = torch.tensor([0.0, -0.0, info.tiny, -info.tiny / 4, info.max, info.min, info.smallest_normal])
    return torch.cat([values.to(dtype), torch.nan_to_num(special.to(dtype))])


def bits(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("count", [1, 3, 7, 10])
def test_m1_average_of_identical_models_is_bit_identical(tmp_path, dtype, count):
    tensors = {"a": awkward(dtype, 4094), "b": awkward(dtype, 11, 1).reshape(3, 6)}
    models = [write_model(tmp_path / f"m{index}", tensors) for index in range(count)]
    merge(tmp_path / "uniform", models)
    weights = {path.name: 0.1 + index for index, path in enumerate(models)}
    merge(tmp_path / "weighted", models, "weighted", weights=weights)
    for output in ("uniform", "weighted"):
        merged = load_file(tmp_path / output / "model.safetensors")
        for name, tensor in tensors.items():
            assert torch.equal(bits(merged[name]), bits(tensor)), (output, name)


@pytest.mark.parametrize("dtype", FLOATS)
def test_m6_one_hot_weights_copy_the_model(tmp_path, dtype):
    models = [write_model(tmp_path / f"m{i}", {"a": awkward(dtype, 999, i)}) for i in range(3)]
    merge(tmp_path / "out", models, "weighted", weights={"m1": 2.0})
    assert torch.equal(
        bits(load_file(tmp_path / "out/model.safetensors")["a"]), bits(load_file(models[1] / "model.safetensors")["a"])
    )


@pytest.mark.parametrize("dtype", FLOATS)
def test_averages_equal_torch(tmp_path, dtype):
    generator = torch.Generator().manual_seed(3)
    tensors = [{"w": torch.randn(1001, 33, generator=generator).to(dtype)} for _ in range(5)]
    models = [write_model(tmp_path / f"m{index}", content) for index, content in enumerate(tensors)]
    wide = torch.float32 if dtype.itemsize == 2 else torch.float64
    merge(tmp_path / "uniform", models)
    expected = torch.zeros(1001, 33, dtype=wide)
    for content in tensors:
        expected += content["w"].to(wide)
    merged = load_file(tmp_path / "uniform/model.safetensors")["w"]
    tolerance = {"rtol": 1e-14, "atol": 1e-15} if dtype is torch.float64 else {"rtol": 0, "atol": 0}
    torch.testing.assert_close(merged, (expected / 5).to(dtype), **tolerance)
    weights = [0.4, 0.3, 0.15, 0.1, 0.05]
    merge(tmp_path / "weighted", models, "weighted", weights={f"m{i}": 3 * w for i, w in enumerate(weights)})
    expected = sum(content["w"].double() * weight for content, weight in zip(tensors, weights, strict=True))
    merged = load_file(tmp_path / "weighted/model.safetensors")["w"]
    torch.testing.assert_close(merged, expected.to(dtype), rtol=2 * torch.finfo(dtype).eps, atol=1e-7)


def test_r16_same_bytes_for_any_threads_memory_and_order_of_names(tmp_path):
    generator = torch.Generator().manual_seed(0)
    models = [
        write_model(
            tmp_path / f"m{index}",
            {
                "a": torch.randn(700, 301, generator=generator).bfloat16(),
                "b": torch.randn(100, 99, generator=generator),
            },
        )
        for index in range(3)
    ]
    found = set()
    for number, (threads, memory) in enumerate(itertools.product((1, 2, 4), (1, 64 << 20))):
        spec = spec_for(tmp_path / "out", models, memory_bytes=memory)
        found.add(run_spec(spec, num_threads=threads).files["model.safetensors"])
        assert found == {hashes(tmp_path / "out")["model.safetensors"]}, number
    for order in itertools.permutations(models):
        merge_models({path.name: path for path in order}, tmp_path / "named")
        assert hashes(tmp_path / "named")["model.safetensors"] in found
    weights = {"m0": 0.5, "m1": 0.2, "m2": 0.3}
    results = [
        merge(tmp_path / "out", models, "weighted", weights=dict(order))
        for order in itertools.permutations(weights.items())
    ]
    assert len({result.files["model.safetensors"] for result in results}) == 1


def test_m2_inputs_are_not_touched(tmp_path):
    models = [write_model(tmp_path / f"m{index}", {"a": torch.full((9,), float(index))}) for index in range(2)]
    before = [hashes(path) for path in models]
    merge(tmp_path / "out", models)
    assert [hashes(path) for path in models] == before


def test_different_layouts_of_the_same_tensors_average_alike(tmp_path):
    from btm.merge.tensor_file import format_header

    generator = torch.Generator().manual_seed(1)
    content = [{name: torch.randn(5, 7, generator=generator).bfloat16() for name in ("a", "b", "c")} for _ in range(2)]
    models = [write_model(tmp_path / f"m{index}", tensors) for index, tensors in enumerate(content)]
    expected = merge(tmp_path / "out", models).files
    shuffled = [("c", "BF16", (5, 7)), ("a", "BF16", (5, 7)), ("b", "BF16", (5, 7))]
    payload = b"".join(bytes(bits(content[1][name])) for name, _, _ in shuffled)
    # One byte of header more puts every tensor at an odd address.
    header = format_header(shuffled, {})
    text = header[8:] + b" "
    (models[1] / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + payload)
    assert merge(tmp_path / "out", models).files == expected


def test_shards_are_read_and_written(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2
    )
    models = []
    for index in range(2):
        torch.manual_seed(index)
        models.append(tmp_path / f"m{index}")
        LlamaForCausalLM(config).save_pretrained(models[-1], max_shard_size="20KB" if index else "1GB")
    assert (models[1] / "model.safetensors.index.json").is_file()
    whole = merge(tmp_path / "whole", models).files
    assert list(whole) == ["model.safetensors"]
    sharded = run_spec(spec_for(tmp_path / "sharded", models), shard_bytes=20_000).files
    assert len(sharded) > 2
    assert all(path.stat().st_size < 25_000 for path in (tmp_path / "sharded").glob("*.safetensors"))
    one = LlamaForCausalLM.from_pretrained(tmp_path / "whole")
    two = LlamaForCausalLM.from_pretrained(tmp_path / "sharded")
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))


def test_m3_whole_numbers_are_copied_and_must_be_equal(tmp_path):
    buffers = {"steps": torch.arange(300), "mask": torch.tensor([True, False, True])}
    models = [write_model(tmp_path / f"m{i}", {"w": torch.full((4,), float(i)), **buffers}) for i in range(3)]
    merge(tmp_path / "out", models)
    merged = load_file(tmp_path / "out/model.safetensors")
    assert torch.equal(merged["w"], torch.ones(4))
    assert torch.equal(merged["steps"], buffers["steps"])
    assert torch.equal(merged["mask"], buffers["mask"])
    write_model(models[2], {"w": torch.zeros(4), "steps": torch.arange(300) + 1, "mask": buffers["mask"]})
    with pytest.raises(MergeError, match=r"tensor 'steps' of I64 differs between .*m0.* and .*m2"):
        merge(tmp_path / "out", models)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("method", ["uniform", "weighted"])
def test_nan_is_reported_with_file_and_tensor(tmp_path, dtype, method):
    models = []
    for index in range(3):
        tensors = {"a": torch.ones(5000).to(dtype), "b": torch.ones(70, 100).to(dtype), "c": torch.ones(9).to(dtype)}
        if index == 1:
            tensors["b"][41, 3] = float("nan")
        models.append(write_model(tmp_path / f"m{index}", tensors))
    with pytest.raises(MergeError, match=r"m1/model\.safetensors holds NaN in tensor 'b' at element 4103"):
        merge(tmp_path / "out", models, method, weights={"m0": 0.5, "m1": 0.2, "m2": 0.3})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m0", "m1", "m2"]


@pytest.mark.parametrize("dtype", FLOATS)
def test_infinities_pass_only_where_all_models_agree(tmp_path, dtype):
    mask = torch.tensor([1.0, float("-inf"), 3.0]).to(dtype)
    models = [write_model(tmp_path / f"m{index}", {"mask": mask * (index + 1)}) for index in range(2)]
    merge(tmp_path / "out", models)
    merged = load_file(tmp_path / "out/model.safetensors")["mask"]
    assert torch.equal(merged, torch.tensor([1.5, float("-inf"), 4.5]).to(dtype))
    write_model(models[1], {"mask": torch.tensor([1.0, 2.0, 3.0]).to(dtype)})
    with pytest.raises(MergeError, match=r"m0/.* holds an infinite value in tensor 'mask' at element 1"):
        merge(tmp_path / "out", models)


@pytest.mark.parametrize("dtype", FLOATS)
def test_sums_beyond_the_largest_number_still_have_their_mean(tmp_path, dtype):
    largest = torch.finfo(dtype).max
    rows = [torch.tensor([largest, largest, 1.0]), torch.tensor([largest, -largest, 2.0])]
    if dtype is torch.float64:
        rows = [torch.tensor(row.tolist(), dtype=dtype).clamp(-largest, largest) for row in rows]
    models = [write_model(tmp_path / f"m{index}", {"a": row.to(dtype)}) for index, row in enumerate(rows)]
    merge(tmp_path / "out", models)
    assert load_file(tmp_path / "out/model.safetensors")["a"].tolist() == [largest, 0.0, 1.5]


def test_memory_depends_neither_on_size_nor_on_number(tmp_path):
    tensors = {f"w{index}": torch.randn(1 << 21) for index in range(4)}
    models = [write_model(tmp_path / f"m{index}", tensors) for index in range(4)]
    spec = spec_for(tmp_path / "out", models)
    spec.save(tmp_path / "spec.json")
    program = (
        "import re, sys, threading, btm.merge.worker as worker\n"
        "peak, done = [0], threading.Event()\n"
        "def private():\n"
        "    text = open('/proc/self/smaps_rollup').read()\n"
        "    return int(re.search(r'Private_Dirty: +(\\d+)', text)[1])\n"
        "def watch():\n"
        "    while not done.wait(0.002): peak[0] = max(peak[0], private())\n"
        "thread = threading.Thread(target=watch); thread.start(); start = private()\n"
        "code = worker.main(sys.argv[1:]); done.set(); thread.join()\n"
        "print(code, (peak[0] - start) // 1024, 'torch' in sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "spec.json")], capture_output=True, text=True, check=True
    )
    code, megabytes, torch_imported = done.stdout.split()
    assert (code, torch_imported) == ("0", "False")
    assert 0 < int(megabytes) < 40
