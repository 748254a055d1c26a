"""Merges that are killed, inputs that are damaged, full disks: the old average or the new one, nothing else."""

import hashlib
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import xxhash
from tiny_models import hashes, merge, spec_for, worker, write_model

from btm.errors import MergeError
from btm.files import sha256_of_file
from btm.merge.worker import run_spec
from btm.records import MergeResult


def small_models(folder: Path) -> list[Path]:
    torch.manual_seed(0)
    return [write_model(folder / f"elm{index}", {"a": torch.randn(64, 32), "b": torch.randn(7)}) for index in range(2)]


def flip(path, generator):
    content = bytearray(path.read_bytes())
    content[generator.randrange(len(content))] ^= 1 << generator.randrange(8)
    path.write_bytes(content)


def truncate(path, generator):
    os.truncate(path, generator.randrange(path.stat().st_size))


def hole(path, generator):
    content = bytearray(path.read_bytes())
    start = generator.randrange(len(content) - 600)
    content[start : start + 600] = bytes(600)
    path.write_bytes(content)


@pytest.mark.parametrize("algorithm", ["sha256", "xxh3"])
def test_r3_every_damage_to_a_recorded_model_is_noticed(tmp_path, algorithm):
    def record(path):
        data = (path / "model.safetensors").read_bytes()
        if algorithm == "xxh3":
            return {"checksums": {"model.safetensors": xxhash.xxh3_128(data).hexdigest()}}
        return {"files": {"model.safetensors": hashlib.sha256(data).hexdigest()}}

    paths = small_models(tmp_path)
    sound = [(path / "model.safetensors").read_bytes() for path in paths]
    records = {path.name: record(path) for path in paths}
    spec = spec_for(tmp_path / "out", paths, **records)
    expected = run_spec(spec).files
    generator = random.Random(0)
    for number in range(60):
        victim = paths[number % 2] / "model.safetensors"
        (flip, truncate, hole)[number % 3](victim, generator)
        with pytest.raises(MergeError, match=r"model\.safetensors"):
            run_spec(spec)
        victim.write_bytes(sound[number % 2])
    for path, other in zip(paths, reversed(sound), strict=True):
        (path / "model.safetensors").write_bytes(other)
    with pytest.raises(MergeError, match="has changed"):
        run_spec(spec)
    for path, content in zip(paths, sound, strict=True):
        (path / "model.safetensors").write_bytes(content)
    assert run_spec(spec).files == expected


def test_r3_a_missing_and_an_unrecorded_file_are_noticed(tmp_path):
    paths = small_models(tmp_path)
    missing = {"files": {"model.safetensors": sha256_of_file(paths[0] / "model.safetensors"), "gone.json": "00"}}
    with pytest.raises(MergeError, match=r"gone\.json is missing"):
        merge(tmp_path / "out", paths, elm0=missing)
    with pytest.raises(MergeError, match=r"model\.safetensors is not in the record of model 'elm1'"):
        merge(tmp_path / "out", paths, elm1={"files": {"config.json": "00"}})


def test_r1_killed_at_any_moment_nothing_is_half_written(tmp_path):
    tensors = {f"w{index}": torch.randn(1 << 20) for index in range(8)}
    inputs = tmp_path / "inputs"
    models = [write_model(inputs / f"m{index}", tensors | {"x": torch.full((9,), float(index))}) for index in range(3)]
    output = tmp_path / "averages/out"
    specs = {}
    for name, weights in (("old", {"m0": 1.0}), ("new", {"m0": 1.0, "m1": 2.0, "m2": 1.0})):
        spec = spec_for(output, models, "weighted", weights=weights)
        spec.save(tmp_path / f"{name}.json")
        result = run_spec(spec)
        specs[name] = spec, hashes(output), result
    process, began = worker(tmp_path / "new.json"), time.monotonic()
    assert process.wait(60) == 0
    duration = time.monotonic() - began
    run_spec(specs["old"][0])
    generator, killed = random.Random(1), 0
    for number in range(12):
        process = worker(tmp_path / "new.json")
        time.sleep(duration * (0.4 + 0.6 * number / 12) * generator.uniform(0.9, 1.0))
        process.kill()
        killed += process.wait(60) == -9
        process.communicate()
        if output.exists():
            assert hashes(output) in (specs["old"][1], specs["new"][1])
        if (tmp_path / "averages/out.json").exists():
            spec_hash = MergeResult.load(tmp_path / "averages/out.json").spec_sha256
            known = {spec.sha256: content for spec, content, _ in specs.values()}
            assert hashes(output) == known[spec_hash]
        if number % 3 == 2:
            run_spec(specs["old"][0])
    assert killed >= 6
    process = worker(tmp_path / "new.json")
    assert process.communicate(timeout=60)[1] == ""
    assert hashes(output) == specs["new"][1]
    assert sorted(path.name for path in output.parent.iterdir()) == ["out", "out.json"]


def test_leftovers_of_a_running_merge_stay(tmp_path):
    import fcntl

    paths = [write_model(tmp_path / f"m{index}", {"a": torch.ones(3)}) for index in range(2)]
    dead, alive = tmp_path / ".tmp-out-dead", tmp_path / ".tmp-out-alive"
    for folder in (dead, alive):
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"half")
    holder = os.open(alive, os.O_RDONLY)
    fcntl.flock(holder, fcntl.LOCK_EX)
    merge(tmp_path / "out", paths)
    os.close(holder)
    assert not dead.exists()
    assert (alive / "model.safetensors").exists()


def test_a_full_disk_leaves_the_old_average(tmp_path):
    tensors = {"w": torch.randn(1 << 20)}
    paths = [write_model(tmp_path / f"m{index}", tensors) for index in range(2)]
    merge(tmp_path / "out", paths[:1])
    before = hashes(tmp_path / "out")
    spec_for(tmp_path / "out", paths, "weighted", weights={"m0": 1.0, "m1": 3.0}).save(tmp_path / "spec.json")
    script = f"ulimit -f 1024; exec {sys.executable} -m btm.merge.worker {tmp_path / 'spec.json'}"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "nothing was changed" in done.stderr
    assert "Traceback" not in done.stderr
    assert hashes(tmp_path / "out") == before
    assert not list(tmp_path.glob(".tmp-*"))
