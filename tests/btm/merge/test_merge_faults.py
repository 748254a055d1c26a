"""Merges that are killed, inputs that are damaged, full disks: the old average or the new one, nothing else."""

import hashlib
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import xxhash
from tiny_models import hashes, merge, spec_for, worker, write_model

from btm.errors import MergeError
from btm.files import sha256_of_file
from btm.merge.worker import run_spec
from btm.records import MergeResult
from tests.btm.chosen_moments import die_at_change, die_at_size, fork, wait


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


class Averages:
    """An old average in its place, and the request for a new one."""

    def __init__(self, folder: Path, num_values: int) -> None:
        tensors = {f"w{index}": torch.randn(num_values) for index in range(4)}
        models = [write_model(folder / f"m{index}", tensors | {"x": torch.full((9,), index / 2)}) for index in range(3)]
        self.output, self.log = folder / "averages/out", folder / "log.txt"
        self.new = spec_for(self.output, models, "weighted", weights={"m0": 1.0, "m1": 2.0, "m2": 1.0})
        self.old = spec_for(self.output, models, "weighted", weights={"m0": 1.0})
        self.content = {}
        for spec in (self.new, self.old):
            run_spec(spec)
            self.content[spec.sha256] = hashes(self.output)

    def merge_anew(self, before: Callable[[], None]) -> int:
        """Exit code of a process that makes the new average; ``before`` runs in it first."""

        def work() -> None:
            before()
            run_spec(self.new)

        return wait(fork(work, log=self.log))

    def check_whole(self) -> None:
        """The old average or the new one or none, and a result only beside the average that it describes."""
        result = self.output.with_name("out.json")
        if self.output.exists():
            assert hashes(self.output) in self.content.values()
        if result.exists():
            assert hashes(self.output) == self.content[MergeResult.load(result).spec_sha256]

    def check_end(self) -> None:
        """The real worker makes the new average and clears away what others left."""
        self.new.save(self.output.parents[1] / "new.json")
        process = worker(self.output.parents[1] / "new.json")
        assert process.communicate(timeout=120)[1] == ""
        self.check_whole()
        assert hashes(self.output) == self.content[self.new.sha256]
        assert sorted(path.name for path in self.output.parent.iterdir()) == ["out", "out.json"]


@pytest.mark.parametrize("begins_with_the_old", [True, False])
def test_r1_killed_at_any_change_nothing_is_half_written(tmp_path, begins_with_the_old):
    """Just before the n-th change of a file an attempt is killed, for every n until one attempt reaches the end."""
    averages, kills = Averages(tmp_path, 1000), 0
    for number in range(1, 200):
        code = averages.merge_anew(lambda number=number: die_at_change(number))
        if code == 0:
            break
        assert code == -signal.SIGKILL, averages.log.read_text()
        averages.check_whole()
        kills += 1
        if begins_with_the_old:
            run_spec(averages.old)
    assert 15 <= kills == number - 1
    averages.check_end()


def test_r1_killed_inside_the_write_of_the_weights_the_old_average_stays(tmp_path):
    averages = Averages(tmp_path, 1 << 19)
    whole = (averages.output / "model.safetensors").stat().st_size
    for num_bytes in (1, 100, whole // 3, whole // 2, whole - 1):
        assert averages.merge_anew(lambda num_bytes=num_bytes: die_at_size(num_bytes)) == -signal.SIGXFSZ
        (half,) = averages.output.parent.glob(".tmp-out-*/model.safetensors")
        assert half.stat().st_size == num_bytes
        assert hashes(averages.output) == averages.content[averages.old.sha256]
        averages.check_whole()
    averages.check_end()


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
