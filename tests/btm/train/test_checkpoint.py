"""R3, R4: every damage is noticed before anything is loaded; a full disk harms nothing that was there."""

import json
import logging
import os
import random
import resource
import shutil
from pathlib import Path

import pytest
import torch

from btm.errors import TrainingError
from btm.train.checkpoint import Checkpoint, CheckpointStore, verified

FILES = ("model.safetensors", "optimizer.safetensors", "state.json", "manifest.json")


def content(update: int, scale: int = 1) -> dict[str, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(update)
    shape = (40 * scale, 30)
    return {
        "model.safetensors": {"w": torch.randn(shape, generator=generator), "b": torch.ones(30)},
        "optimizer.safetensors": {
            "exp_avg.w": torch.randn(shape, generator=generator),
            "exp_avg.b": torch.zeros(30),
        },
    }


def saved(directory: Path, *updates: int, keep: int = 2) -> CheckpointStore:
    store = CheckpointStore(directory, keep=keep)
    for update in updates:
        store.save(update, content(update), json.dumps({"update": update}))
    return store


def newest_update(store: CheckpointStore) -> int | None:
    checkpoint = store.newest(set_aside=True)
    return None if checkpoint is None else checkpoint.update


def test_what_is_saved_comes_back_bit_by_bit(tmp_path):
    checkpoint = saved(tmp_path, 5).newest(set_aside=True)
    assert checkpoint is not None
    assert json.loads(checkpoint.state) == {"update": 5}
    for name, tensors in content(5).items():
        destination = {key: torch.empty_like(tensor) for key, tensor in tensors.items()}
        checkpoint.load(name, destination)
        assert all(torch.equal(destination[key], tensor) for key, tensor in tensors.items())


def test_only_the_newest_are_kept_and_nothing_else_lies_around(tmp_path):
    saved(tmp_path, 5, 10, 15, 20, keep=3)
    assert sorted(os.listdir(tmp_path)) == ["step-00000010", "step-00000015", "step-00000020"]


def test_leftovers_of_a_killed_writer_are_no_checkpoints_and_are_cleaned(tmp_path):
    store = saved(tmp_path, 5)
    shutil.copytree(tmp_path / "step-00000005", tmp_path / ".tmp-step-00000010-xyz")
    assert newest_update(store) == 5
    store.clean()
    assert os.listdir(tmp_path) == ["step-00000005"]


def damage_at_random(directory: Path, generator: random.Random) -> str:
    """Damage one file of a checkpoint in one of the ways that storage does; returns what was done."""
    kind = generator.choice(["flip", "flip", "flip", "zeros", "truncate", "remove", "append", "swap"])
    name = generator.choice(FILES)
    path = directory / name
    data = bytearray(path.read_bytes())
    if kind == "swap":
        other = directory / generator.choice([other for other in FILES if other != name])
        path.write_bytes(other.read_bytes())
        other.write_bytes(data)
        return f"swap {name} {other.name}"
    if kind == "remove":
        path.unlink()
        return f"remove {name}"
    at = generator.randrange(len(data))
    if kind == "flip":
        data[at] ^= 1 << generator.randrange(8)
    elif kind == "zeros":
        at = next(place for place in range(at, at + len(data)) if data[place % len(data)]) % len(data)
        data[at : at + 4096] = bytes(len(data[at : at + 4096]))
    elif kind == "truncate":
        del data[at:]
    else:
        data += b"\n"
    path.write_bytes(data)
    return f"{kind} {name} {at}"


@pytest.mark.parametrize("seed", range(4))
def test_every_random_damage_is_noticed_and_the_one_before_is_used(tmp_path, seed, caplog):
    generator = random.Random(seed)
    whole = tmp_path / "whole"
    saved(whole, 5, 10)
    for number in range(60):
        directory = tmp_path / str(number)
        shutil.copytree(whole, directory)
        what = damage_at_random(directory / "step-00000010", generator)
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            assert newest_update(CheckpointStore(directory)) == 5, what
        assert str(directory / "step-00000010") in caplog.text
        assert sorted(os.listdir(directory)) == ["damaged-step-00000010", "step-00000005"], what
        shutil.rmtree(directory)


@pytest.mark.parametrize("name", FILES)
def test_the_same_file_of_another_checkpoint_is_noticed(tmp_path, name):
    store = saved(tmp_path, 5, 10)
    shutil.copy(tmp_path / "step-00000005" / name, tmp_path / "step-00000010" / name)
    assert newest_update(store) == 5


def test_whole_checkpoints_that_changed_places_are_noticed(tmp_path):
    store = saved(tmp_path, 5, 10)
    for source, target in (("step-00000005", "x"), ("step-00000010", "step-00000005"), ("x", "step-00000010")):
        os.rename(tmp_path / source, tmp_path / target)
    assert newest_update(store) is None


def test_a_file_that_does_not_belong_is_noticed(tmp_path):
    store = saved(tmp_path, 5, 10)
    (tmp_path / "step-00000010" / "more.safetensors").write_bytes(b"")
    assert newest_update(store) == 5


def test_a_damaged_checkpoint_is_tried_once_and_goes_when_new_ones_are_there(tmp_path, caplog):
    store = saved(tmp_path, 5, 10)
    (tmp_path / "step-00000010" / "state.json").write_text("{}")
    assert newest_update(store) == 5
    caplog.clear()
    assert newest_update(store) == 5
    assert not caplog.text
    store.save(10, content(10), "{}")
    assert newest_update(store) == 10
    assert sorted(os.listdir(tmp_path)) == ["step-00000005", "step-00000010"]


def test_a_reader_that_does_not_own_the_run_renames_nothing(tmp_path):
    store = saved(tmp_path, 5, 10)
    (tmp_path / "step-00000010" / "state.json").write_text("{}")
    checkpoint = store.newest(set_aside=False)
    assert checkpoint is not None
    assert checkpoint.update == 5
    assert sorted(os.listdir(tmp_path)) == ["step-00000005", "step-00000010"]


def test_an_unreadable_file_is_damage_and_not_a_crash(tmp_path):
    saved(tmp_path, 5)
    path = tmp_path / "step-00000005" / "model.safetensors"
    path.unlink()
    path.mkdir()
    assert "model.safetensors" in str(verified(tmp_path / "step-00000005", 5))


def test_a_full_disk_leaves_the_previous_checkpoint_and_names_the_bytes(tmp_path):
    store = saved(tmp_path, 5)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (6000, limits[1]))
    try:
        with pytest.raises(TrainingError, match=r"update 10.*needs \d+ bytes.*earlier checkpoints are untouched"):
            store.save(10, content(10, scale=50), "{}")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert os.listdir(tmp_path) == ["step-00000005"]
    assert isinstance(verified(tmp_path / "step-00000005", 5), Checkpoint)
