"""R3, R4: 200 random damages and a full disk, on a forest that `btm run` has made."""

import os
import random
import resource
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import pytest
from forest_outcome import differences, leftovers, outcome
from killed_runs import btm_command

from btm.files import sha256_of_file
from btm.forest import Forest
from btm.train.checkpoint import Checkpoint, CheckpointStore, verified

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

KINDS = ("truncated", "bit flipped", "4 KiB of zeros", "missing", "swapped")
NUM_DAMAGES = 200
HOLE_BYTES = 4096
FILE_SIZE_LIMITS = (20_000, 600_000)
"""Bytes: too few for a corpus; enough for corpus and weights, too few for the optimizer state."""


def damage(path: Path, other: Path, kind: str, generator: random.Random) -> None:
    """Damage ``path`` (a file of its own, not a link) so that its content differs."""
    before = path.read_bytes()
    content = bytearray(before)
    if kind == "missing":
        path.unlink()
        return
    if kind == "swapped":
        path.write_bytes(other.read_bytes())
        other.write_bytes(before)
        return
    at = generator.randrange(len(content))
    if kind == "truncated":
        del content[at:]
    elif kind == "bit flipped":
        content[at] ^= 1 << generator.randrange(8)
    else:
        at = generator.choice([place for place in range(0, len(content), HOLE_BYTES) if any(content[place:][:4096])])
        content[at : at + HOLE_BYTES] = bytes(len(content[at : at + HOLE_BYTES]))
    path.write_bytes(content)
    assert path.read_bytes() != before


def damage_checkpoint(run: Path, scratch: Path, kind: str, generator: random.Random) -> tuple[str, int, int]:
    """Damage the newest of a run's checkpoints; returns the file, the update of the one before and of the choice."""
    directory = scratch / "checkpoints"
    shutil.copytree(run / "checkpoints", directory)
    before, newest = sorted(directory.glob("step-*"))[-2:]
    victim = generator.choice(sorted(newest.iterdir()))
    # The file of the same name beside it fits in every way but its content; a manifest of another is as good.
    damage(victim, before / victim.name if generator.random() < 0.5 else _sibling(victim), kind, generator)
    number = int(before.name.removeprefix("step-"))
    was_whole = isinstance(verified(before, number), Checkpoint)
    chosen = CheckpointStore(directory).newest(set_aside=True)
    shutil.rmtree(directory)
    return victim.name, number if was_whole else -1, chosen.update if chosen else -1


def _sibling(path: Path) -> Path:
    return next(other for other in sorted(path.parent.iterdir()) if other.name != path.name)


def damage_elm(forest: Path, scratch: Path, kind: str, generator: random.Random) -> tuple[str, list[str]]:
    """Damage one file of a forest's models; returns its path and what the forest says."""
    copy = scratch / "forest"
    for part in ("seed", "elms"):
        shutil.copytree(forest / part, copy / part)
    shutil.copy(forest / "forest.json", copy)
    models = [copy / "seed", *sorted((copy / "elms").iterdir())]
    model, stranger = generator.sample(models, 2)
    name = generator.choice(["model.safetensors", "model.safetensors", "config.json", "tokenizer.json"])
    others = [stranger / name, *(file for file in sorted(model.iterdir()) if file.name != name)]
    differing = [file for file in others if sha256_of_file(file) != sha256_of_file(model / name)]
    damage(model / name, generator.choice(differing), kind, generator)
    problems = Forest.open(copy).damages()
    shutil.rmtree(copy)
    return str(model / name), problems


def test_r3_every_one_of_200_random_damages_is_noticed(reference, tmp_path):
    generator = random.Random(0)
    runs = [reference / "runs" / name for name in ("seed", "dense", "elm/code", "elm/docs", "elm/mail")]
    noticed: Counter[tuple[str, str]] = Counter()
    for number in range(NUM_DAMAGES):
        kind = KINDS[number // 2 % len(KINDS)]
        if number % 2:
            name, before, chosen = damage_checkpoint(generator.choice(runs), tmp_path, kind, generator)
            assert chosen == before, f"{kind}: {name}"
            noticed["checkpoint", kind] += 1
        else:
            path, problems = damage_elm(reference, tmp_path, kind, generator)
            assert any(problem.startswith(path) for problem in problems), f"{kind}: {path}"
            noticed["model", kind] += 1
    assert noticed.total() == NUM_DAMAGES
    print("\n" + "\n".join(f"{what:<12}{kind:<16}{count:>4} of {count}" for (what, kind), count in noticed.items()))


def test_r3_a_run_with_a_damaged_checkpoint_continues_from_the_one_before(reference, tmp_path, arguments, env):
    forest = tmp_path / "forest"
    shutil.copytree(reference, forest)
    run = forest / "runs/elm/docs"
    (run / "result.json").unlink()
    shutil.rmtree(run / "model")
    before, newest = sorted((run / "checkpoints").glob("step-*"))[-2:]
    damage(newest / "optimizer.safetensors", before / "optimizer.safetensors", "bit flipped", random.Random(0))
    subprocess.run(btm_command(*arguments, f"forest={forest}"), cwd=tmp_path, env=env, check=True, timeout=170)
    log = (run / "log.txt").read_text()
    assert f"{newest} is damaged: " in log
    assert "optimizer.safetensors has changed; the one before it is used" in log
    assert f"updates {int(before.name.removeprefix('step-')) + 1} to" in log
    assert differences(outcome(reference), outcome(forest)) == []


@pytest.mark.parametrize("limit", FILE_SIZE_LIMITS)
def test_r4_a_full_disk_stops_cleanly_and_the_run_completes_when_there_is_space(
    reference, tmp_path, arguments, env, limit
):
    """The limit on the size of files gives the same error as a full disk at the same place in the code."""

    def limit_files() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))

    forest = tmp_path / "forest"
    command = btm_command(*arguments, f"forest={forest}")
    stopped = subprocess.run(
        command,
        cwd=tmp_path,
        env=env,
        preexec_fn=limit_files,
        capture_output=True,
        text=True,
        timeout=170,
        check=False,
    )
    said = stopped.stdout + stopped.stderr
    assert stopped.returncode == 1, said
    assert "File too large" in said
    assert "room" in said
    assert "Traceback" not in said
    if Forest.exists(forest):
        assert Forest.open(forest).damages() == []
    assert not [name for name in leftovers(forest) if os.path.getsize(forest / name) > limit]
    subprocess.run(command, cwd=tmp_path, env=env, check=True, timeout=170, stdout=subprocess.DEVNULL)
    assert differences(outcome(reference), outcome(forest)) == []
    assert leftovers(forest) == []
