"""Bad and hostile input, through the real command: a clear answer, the right exit code, and nothing changed."""

import hashlib
import shlex
import shutil
from pathlib import Path

import pytest

from btm import session
from btm.cli import main
from btm.forest import Forest
from tests.integration.bad_input_cases import CONFIGS, DATA, REQUESTS, Case
from tests.integration.hostile_cases import DAMAGES, MODELS

LEFTOVERS = ("forest/runs/prepare/bad/", "forest/corpus/.survey/bad/")
"""What a failed preparation may leave for the next attempt."""


def tree(folder: Path) -> dict[str, str]:
    """Name -> hash of everything below ``folder`` except locks."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_symlink():
            found[str(path.relative_to(folder))] = f"-> {path.readlink()}"
        elif path.is_file() and path.suffix != ".lock" and path.name != ".lock":
            found[str(path.relative_to(folder))] = hashlib.md5(path.read_bytes()).hexdigest()
    return found


@pytest.fixture
def ask(forest, corpora, tmp_path, monkeypatch, capfd):
    """Spoil what the case spoils, run its command in an empty directory, and compare answer and disk."""

    def _ask(case: Case) -> None:
        folder = forest
        if case.own:
            folder = tmp_path / "forest"
            shutil.copytree(forest, folder)
        if case.spoil:
            case.spoil(folder, tmp_path)
        work = tmp_path / "work"
        work.mkdir()
        monkeypatch.chdir(work)
        # The fork server need not load torch for steps that fail before they use it.
        monkeypatch.setattr(session, "_PRELOAD", ())
        places = {"{forest}": str(folder), "{tmp}": str(tmp_path), "{corpora}": str(corpora)}
        arguments, words = case.arguments, case.words
        if case in DAMAGES:
            arguments += " forest={forest}"
        for name, value in places.items():
            arguments, words = arguments.replace(name, value), words.replace(name, value)
        before = tree(tmp_path) | {f"forest/{name}": value for name, value in tree(forest).items()}
        with pytest.raises(SystemExit) as ended:
            main(shlex.split(arguments))
        output = capfd.readouterr()
        text = output.out + output.err
        assert "Traceback" not in text, text[-3000:]
        assert words in output.err, text[-3000:]
        assert ended.value.code == case.exit_code, text[-3000:]
        after = tree(tmp_path) | {f"forest/{name}": value for name, value in tree(forest).items()}
        new = {name for name in after if name not in before}
        assert {name: after.get(name) for name in before} == before
        assert all(name.startswith(LEFTOVERS) for name in new), new

    yield _ask
    for leftover in LEFTOVERS:
        shutil.rmtree(forest.parent / leftover, ignore_errors=True)


@pytest.mark.parametrize("case", CONFIGS, ids=lambda case: case.name)
def test_wrong_configurations(ask, case):
    ask(case)


@pytest.mark.parametrize("case", DATA, ids=lambda case: case.name)
def test_broken_texts(ask, case):
    ask(case)


@pytest.mark.parametrize("case", MODELS, ids=lambda case: case.name)
def test_hostile_models(ask, case):
    ask(case)


@pytest.mark.parametrize("case", DAMAGES, ids=lambda case: case.name)
def test_damaged_forests(ask, case):
    ask(case)


@pytest.mark.parametrize("case", REQUESTS, ids=lambda case: case.name)
def test_impossible_requests(ask, case):
    ask(case)


@pytest.mark.parametrize(
    "arguments",
    [
        "add domain=mail data.path={corpora}/mail.jsonl",
        "add domain=guest model.path={forest}/elms/docs",
        "remove domain=docs",
        "evaluate",
        "merge merge=posterior merge.domain=docs",
    ],
)
def test_the_second_of_two_writers_is_told(forest, ask, arguments):
    with Forest.lock(forest):
        ask(Case("two-writers", f"{arguments} forest={{forest}}", "another process holds"))
