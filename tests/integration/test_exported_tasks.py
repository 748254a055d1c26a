"""`btm export-task`, `btm step <directory>`, `btm import`: an ELM is trained where its forest is not, and joins it."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

from btm.config_parse import parse_config
from btm.errors import ConfigError, ForestError
from btm.exported_tasks import TASK_FILE, TRAINED_FILE, ExportedTask, open_task, seal
from btm.files import read_json, sha256_of_file, write_json
from btm.forest import Forest
from btm.records import TrainResult
from btm.requests import TrainSpec
from btm.verbs import export_task, import_task, remove, step
from tests.conftest import run_btm


def configuration(forest, **changes):
    return parse_config(read_json(forest / "config.json") | {"forest": str(forest)} | changes)


def everything(directory):
    """Path -> content of every file."""
    return {
        path.relative_to(directory).as_posix(): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path.name != "forest.lock"
    }


@pytest.fixture
def exported(forest, tmp_path):
    """A forest that has lost the ELM `code`, and the task of training it; the third is the forest that has it."""
    own = tmp_path / "forest"
    shutil.copytree(forest, own)
    remove.main(configuration(own, domain="code"))
    export_task.main(configuration(own, elm="code", output=str(tmp_path / "task")))
    return own, tmp_path / "task", forest


@pytest.fixture
def trained(exported):
    """The same, and the task is what training it leaves: what the forest's own training left, which is the same."""
    own, task, forest = exported
    run = task / "runs/elm/code"
    shutil.copytree(forest / "runs/elm/code", run)
    os.unlink(run / "spec.json")
    seal(open_task(task), task)
    return own, task, forest


def import_into(forest, task, **changes):
    import_task.main(configuration(forest, task=str(task), **changes))


def test_a_task_holds_all_that_it_needs_and_names_nothing_outside(exported):
    own, task, _ = exported
    opened = open_task(task)
    spec = opened.spec(task)
    assert set(opened.inputs) == {name for name in everything(task) if name not in (TASK_FILE, "README.md")}
    for text in ((task / TASK_FILE).read_text(), (task / "README.md").read_text()):
        assert str(own) not in text
    assert spec.sha256 == TrainSpec.load(exported[2] / "runs/elm/code/spec.json").sha256
    assert "btm step" in (task / "README.md").read_text()
    assert (opened.resources.num_processes, opened.resources.num_cpus, opened.resources.num_gpus) == (1, 1, 0)


def test_an_elm_that_comes_back_is_the_one_that_would_have_been_trained_here(trained):
    own, task, forest = trained
    import_into(own, task)
    ours, theirs = Forest.open(own), Forest.open(forest)
    assert ours.domains == theirs.domains == ["code", "docs"]
    assert ours.damages() == []
    same = {"created": "", "ledger": None}
    assert ours.elm("code").model_copy(update=same) == theirs.elm("code").model_copy(update=same)
    assert ours.elm("code").ledger.tokens == theirs.elm("code").ledger.tokens
    result = TrainResult.load(own / "runs/elm/code/result.json")
    assert result.spec_sha256 == TrainSpec.load(own / "runs/elm/code/spec.json").sha256
    assert result.model_dir == str(own / "runs/elm/code/model")
    with pytest.raises(ForestError, match="already has an ELM 'code'; remove it first"):
        import_into(own, task)


@pytest.mark.slow
def test_trained_in_another_place_without_its_forest_and_killed_it_gives_the_same_weights(exported, tmp_path):
    own, task, forest = exported
    hidden, elsewhere = tmp_path / "hidden", tmp_path / "other machine's"
    own.rename(hidden)
    elsewhere.mkdir()
    task.rename(elsewhere / "job")
    command = [sys.executable, "-m", "btm.cli", "step", "job"]
    killed = subprocess.Popen(command, cwd=elsewhere, start_new_session=True, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not list(elsewhere.glob("job/runs/elm/code/checkpoints/step-*")) and time.monotonic() < deadline:
        time.sleep(0.01)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    assert not (elsewhere / "job/runs/elm/code/result.json").exists()
    assert "elm/code is finished" in run_btm("step", "job", cwd=elsewhere).stdout
    assert "continuing from" in (elsewhere / "job/runs/elm/code/log.txt").read_text()
    again = run_btm("step", str(elsewhere / "job"), cwd=tmp_path).stdout
    assert "was finished earlier" in again
    hidden.rename(own)
    assert "code joined" in run_btm("import", "job", f"forest={own}", cwd=elsewhere).stdout
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert sha256_of_file(own / "elms/code" / name) == sha256_of_file(forest / "elms/code" / name)
    evaluated = run_btm("evaluate", f"forest={own}", cwd=tmp_path).stdout
    assert "elm/code" in evaluated


@pytest.mark.slow
def test_a_later_elm_is_prepared_exported_trained_and_imported(forest, corpora, tmp_path):
    own = tmp_path / "forest"
    shutil.copytree(forest, own)
    reference = tmp_path / "reference"
    shutil.copytree(forest, reference)
    text, branch = f"data.path={corpora / 'mail.jsonl'}", "branch=posterior"
    run_btm("add", f"forest={reference}", "domain=mail", text, branch, cwd=tmp_path)
    run_btm("export-task", f"forest={own}", "elm=mail", f"output={tmp_path / 'task'}", text, branch, cwd=tmp_path)
    run_btm("step", "task", cwd=tmp_path)
    other = run_btm("import", "task", f"forest={own}", cwd=tmp_path, check=False)
    assert other.returncode == 1
    assert "start.kind: the forest asks for 'checkpoint', the task has 'weights'" in other.stderr
    run_btm("import", "task", f"forest={own}", branch, cwd=tmp_path)
    ours, theirs = (Forest.open(place).elm("mail") for place in (own, reference))
    assert ours.files["model.safetensors"] == theirs.files["model.safetensors"]
    assert (ours.parents, ours.ancestors) == (theirs.parents, theirs.ancestors)


def refused(own, task, message, error=ForestError, **changes):
    before = everything(own)
    with pytest.raises(error, match=message):
        import_into(own, task, **changes)
    assert everything(own) == before


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("runs/elm/code/model/model.safetensors", "is not what `btm step` left there: model/model.safetensors differs"),
        ("runs/elm/code/checkpoints/step-00000020/model.safetensors", "step-00000020/model.safetensors differs"),
        ("corpus/code/train.bin", r"does not have what the task was exported with: corpus/code/train\.bin differs"),
        ("runs/seed/checkpoints/step-00000010/optimizer.safetensors", "optimizer.safetensors differs"),
    ],
)
def test_a_file_that_has_changed_is_refused(trained, name, message):
    own, task, _ = trained
    flip(task / name)
    refused(own, task, message)


def test_added_missing_and_forged_files_are_refused(trained):
    own, task, forest = trained
    model = task / "runs/elm/code/model"
    (model / "more.safetensors").write_bytes(b"")
    refused(own, task, "model/more.safetensors was added")
    (model / "more.safetensors").unlink()
    (model / "model.safetensors").rename(task / "model.safetensors")
    refused(own, task, "model/model.safetensors is missing")
    (task / "model.safetensors").rename(model / "model.safetensors")
    # Another ELM's weights, with checksums made anew.
    shutil.copy(forest / "elms/docs/model.safetensors", model / "model.safetensors")
    seal(open_task(task), task)
    refused(own, task, "is not what the training's last checkpoint holds; the model was changed after it was trained")
    shutil.copy(forest / "elms/docs/config.json", model / "config.json")
    shutil.copy(own / "runs/seed/checkpoints/step-00000010/optimizer.safetensors", model / "model.safetensors")
    seal(open_task(task), task)
    refused(own, task, "has other tensors than the seed model")


def test_a_training_of_another_request_is_refused(trained):
    own, task, _ = trained
    request = read_json(task / TASK_FILE)
    request["request"]["train"]["lr"] = 0.5
    write_json(task / TASK_FILE, request)
    refused(own, task, r"train\.lr: the forest asks for 0\.002, the task has 0\.5")
    changed = read_json(own / "config.json")["train"] | {"lr": 0.5}
    refused(own, task, "is the result of another request", train=changed)


def test_a_task_of_another_forest_is_refused(trained):
    own, task, _ = trained
    # Another tokenizer, another seed model of the same request, another corpus: each is noticed.
    flip(own / "runs/seed/checkpoints/step-00000010/model.safetensors")
    refused(own, task, r"the forest .* does not have what the task was exported with: .*model\.safetensors differs")
    manifest = read_json(own / "forest.json")
    write_json(own / "forest.json", manifest | {"tokenizer_sha256": "0" * 64})
    refused(own, task, "was exported with tokenizer .* belongs to another forest")
    write_json(own / "forest.json", manifest)
    corpus = own / "corpus/code/corpus.json"
    write_json(corpus, read_json(corpus) | {"fingerprint": "other"})
    refused(own, task, r"fingerprint: the forest asks for 'other'")


def test_tasks_that_are_not_trained_or_none_at_all(exported, tmp_path):
    own, task, _ = exported
    refused(own, task, "is not trained yet; `btm step")
    refused(own, tmp_path / "nowhere", r"holds no exported task \(no task\.json\)")
    with pytest.raises(ConfigError, match="btm import needs the directory"):
        import_task.main(configuration(own))
    write_json(task / TASK_FILE, read_json(task / TASK_FILE) | {"schema_version": 2})
    refused(own, task, "update the program")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda task: task["request"].update(output_dir="<forest>/../../home"), "outside of the task's directory"),
        (lambda task: task["request"].update(output_dir="/elsewhere"), "outside of the task's directory"),
        (lambda task: task["request"].update(output_dir="<forest>/runs/elm/docs"), "not that of ELM 'code'"),
        (lambda task: task["request"].update(tokenizer_dir="/etc"), "outside of the task's directory"),
        (lambda task: task["request"].update(last_update="many"), "the request is damaged"),
        (lambda task: task["inputs"].update({"../secret": "0"}), "outside of the task's directory"),
        (lambda task: task.update(elm="../code"), "cannot be a name"),
    ],
)
def test_a_hostile_task_is_not_run(exported, change, message):
    _, task, _ = exported
    content = json.loads((task / TASK_FILE).read_text())
    change(content)
    write_json(task / TASK_FILE, content)
    with pytest.raises(ForestError, match=message):
        step.main(parse_config({"task": str(task)}))
    assert not (task / "runs/elm").exists()


def test_what_cannot_be_exported_is_said(exported, forest, tmp_path):
    own, task, _ = exported
    with pytest.raises(ForestError, match="exists already; choose another output="):
        export_task.main(configuration(own, elm="code", output=str(task)))
    with pytest.raises(ForestError, match="already has an ELM 'docs'"):
        export_task.main(configuration(own, elm="docs", output=str(tmp_path / "x")))
    with pytest.raises(ConfigError, match=r"elm must be a domain of this forest \(code, docs\).*got 'law'"):
        export_task.main(configuration(own, elm="law", output=str(tmp_path / "x")))
    with pytest.raises(ConfigError, match="needs elm=<name> and output=<directory>"):
        export_task.main(configuration(own))
    (own / "runs/seed/result.json").unlink()
    with pytest.raises(ForestError, match="elm/code needs seed, which is not finished"):
        export_task.main(configuration(own, elm="code", output=str(tmp_path / "x")))
    with pytest.raises(ConfigError, match="got both"):
        step.main(parse_config({"task": str(task), "element": 0}))
    assert not (tmp_path / "x").exists()


def test_inputs_are_checked_before_training(exported):
    _, task, _ = exported
    flip(task / "corpus/code/dev.bin")
    with pytest.raises(ForestError, match=r"corpus/code/dev\.bin differs"):
        step.main(parse_config({"task": str(task)}))
    assert not (task / TRAINED_FILE).exists()
    assert isinstance(ExportedTask.load(task / TASK_FILE), ExportedTask)


class Killed(BaseException):
    pass


def test_killed_at_any_change_of_the_forest_it_has_joined_or_not_and_the_same_command_ends_it(trained, monkeypatch):
    own, task, forest = trained
    start = own.with_name("start")
    shutil.copytree(own, start)
    expected = Forest.open(forest).elm("code").files
    outcomes = set()
    for limit in range(100):
        shutil.rmtree(own)
        shutil.copytree(start, own)
        calls = [0]
        with monkeypatch.context() as patch:
            for module, name in ((os, "replace"), (os, "rename"), (os, "link"), (shutil, "rmtree")):
                patch.setattr(module, name, _counted(getattr(module, name), calls, limit))
            with contextlib.suppress(Killed):
                import_into(own, task)
        now = Forest.open(own)
        assert now.damages() == []
        outcomes.add(tuple(now.domains))
        if now.domains == ["docs"]:
            import_into(own, task)
        assert Forest.open(own).elm("code").files == expected
        assert now.domains != ["docs"] or not list(own.rglob(".tmp-*"))
        if calls[0] <= limit:
            break
    assert 5 < limit < 99
    assert outcomes == {("docs",), ("code", "docs")}


def _counted(function, calls, limit):
    def call(*args, **kwargs):
        calls[0] += 1
        if calls[0] > limit:
            raise Killed
        return function(*args, **kwargs)

    return call
