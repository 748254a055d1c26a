"""The forest: joining, removing, lineage, damage, hostile manifests, two writers at once."""

import json
import multiprocessing
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from btm.errors import ForestError
from btm.forest import Forest, file_hashes
from btm.records import ElmRecord, Ledger, Parent


def record(domain, parents=(), ancestors=()):
    return ElmRecord(
        domain=domain,
        directory="",
        parents=list(parents),
        ancestors=list(ancestors),
        ledger=Ledger(tokens=10),
        data_fingerprint="f",
        files={},
        num_parameters=4,
        created="2026-01-01T00:00:00+00:00",
    )


def model_dir(path: Path, value: float) -> Path:
    path.mkdir(parents=True)
    save_file({"w": np.full((2, 2), value, np.float32)}, path / "model.safetensors")
    (path / "config.json").write_text("{}")
    (path / "evil.py").write_text("raise SystemExit")
    (path / "pytorch_model.bin").write_bytes(b"pickle")
    return path


@pytest.fixture
def forest(tmp_path):
    made = Forest.create(tmp_path / "forest", name="test", tokenizer_sha256="t" * 64, vocab_size=8)
    for index, name in enumerate(("law", "code", "med")):
        made.join(record(name, [Parent(name="seed", weight=1.0)]), model_dir(tmp_path / f"m{index}", index))
    return made


def test_join_takes_data_and_leaves_code_and_pickles(forest):
    assert forest.domains == ["law", "code", "med"]
    assert sorted(file.name for file in forest.directory("law").iterdir()) == ["config.json", "model.safetensors"]
    assert Forest.open(forest.path).elm("code").files == file_hashes(forest.directory("code"))


def test_join_copies_models_of_others(forest, tmp_path):
    (tmp_path / "m0" / "model.safetensors").write_bytes(b"changed by its owner")
    assert forest.damages() == []


def test_b4_remove_leaves_the_others_byte_identical_and_names_the_heirs(forest, tmp_path):
    """B4: exact removal; what was branched from a mixture with the removed ELM is named."""
    parents = [Parent(name="law", weight=0.7), Parent(name="code", weight=0.3)]
    heir = record("tax", parents, forest.ancestors(parents))
    forest.join(heir, model_dir(tmp_path / "tax", 5))
    before = {name: file_hashes(forest.directory(name)) for name in ("code", "med", "tax")}
    assert forest.remove("law") == ["tax"]
    assert {name: file_hashes(forest.directory(name)) for name in before} == before
    assert not (forest.path / "elms/law").exists()
    assert Forest.open(forest.path).domains == ["code", "med", "tax"]


def test_ancestry_is_transitive(forest, tmp_path):
    first = [Parent(name="law", weight=1.0)]
    forest.join(record("a", first, forest.ancestors(first)), model_dir(tmp_path / "a", 1))
    assert forest.ancestors([Parent(name="a", weight=1.0), Parent(name="med", weight=0.0)]) == ["law", "a"]


def test_a_taken_name_is_refused(forest, tmp_path):
    with pytest.raises(ForestError, match="already has an ELM 'law'"):
        forest.join(record("law"), model_dir(tmp_path / "again", 1))


def test_a_leftover_directory_of_a_killed_join_is_replaced(forest, tmp_path):
    leftover = forest.path / "elms" / "new"
    leftover.mkdir()
    (leftover / "half.safetensors").write_bytes(b"x")
    forest.join(record("new"), model_dir(tmp_path / "new", 3))
    assert "half.safetensors" not in forest.elm("new").files
    assert forest.damages() == []


def test_damage_is_noticed(forest):
    weights = forest.directory("med") / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-3] ^= 1
    weights.write_bytes(content)
    (forest.directory("law") / "config.json").unlink()
    problems = forest.damages()
    assert len(problems) == 2
    assert "law/config.json is missing" in problems[0]
    assert "med/model.safetensors does not have the checksum" in problems[1]


@pytest.mark.parametrize("name", ["../x", "/x", ".", "", "a/b", "a b", "-rf", "$(id)", "x" * 65, "a\nb", "nul", "LPT1"])
def test_unsafe_names_are_refused(forest, tmp_path, name):
    with pytest.raises(ForestError, match="cannot be a name"):
        forest.join(record(name), model_dir(tmp_path / "bad", 1))
    assert len(forest.domains) == 3


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda raw: raw.update(schema_version=99), "schema version 99"),
        (lambda raw: raw.update(schema_version="1"), "schema version '1'"),
        (lambda raw: raw.update(extra=1), "extra"),
        (lambda raw: raw["elms"][0].update(directory="../../etc"), "directory must be 'elms/law'"),
        (lambda raw: raw["elms"][0].update(domain="../law"), "cannot be a name"),
        (lambda raw: raw["elms"].append(raw["elms"][0]), "twice"),
        (lambda raw: raw["elms"][0]["files"].update({"../../x": "0"}), "is not a file name"),
        (lambda raw: raw["elms"][0].pop("ledger"), "ledger"),
        (lambda raw: raw["elms"][0].update(num_parameters="many"), "num_parameters"),
    ],
)
def test_a_manifest_of_somebody_else_is_checked(forest, change, words):
    raw = json.loads((forest.path / "forest.json").read_text())
    change(raw)
    (forest.path / "forest.json").write_text(json.dumps(raw))
    with pytest.raises(ForestError) as caught:
        Forest.open(forest.path)
    assert words in str(caught.value)


def test_an_elm_that_is_a_link_is_refused(forest, tmp_path):
    target = forest.path / "elms" / "law"
    target.rename(tmp_path / "elsewhere")
    target.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ForestError, match="is missing \\(or a link\\)"):
        Forest.open(forest.path)


def test_half_a_manifest_is_an_error(forest):
    text = (forest.path / "forest.json").read_text()
    (forest.path / "forest.json").write_text(text[: len(text) // 2])
    with pytest.raises(ForestError, match="not valid JSON"):
        Forest.open(forest.path)


def test_another_tokenizer_is_refused(forest):
    with pytest.raises(ForestError, match="share one tokenizer"):
        Forest.create(forest.path, name="test", tokenizer_sha256="u" * 64, vocab_size=8)


def _try_lock(path, queue):
    try:
        with Forest.lock(path):
            queue.put("got it")
    except ForestError as error:
        queue.put(str(error))


def test_two_writers_at_once_the_second_is_told(forest):
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    with Forest.lock(forest.path):
        process = context.Process(target=_try_lock, args=(forest.path, queue))
        process.start()
        process.join(60)
        assert "another process holds" in queue.get(timeout=60)
    process = context.Process(target=_try_lock, args=(forest.path, queue))
    process.start()
    assert queue.get(timeout=60) == "got it"
    process.join(60)
