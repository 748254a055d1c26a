"""Two processes that change one forest at the same time."""

import shutil
import subprocess
import sys

from btm.forest import Forest, file_hashes


def test_of_two_adds_at_once_one_joins_and_the_other_is_told(forest, corpora, tmp_path):
    folder = tmp_path / "forest"
    shutil.copytree(forest, folder)
    before = {name: file_hashes(folder / "elms" / name) for name in ("code", "docs")}
    texts = {"mail": corpora / "mail.jsonl", "includes": corpora / "headers.jsonl"}
    add = [sys.executable, "-m", "btm.cli", "add", f"forest={folder}", "data.on_error=skip"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    running = {
        domain: subprocess.Popen([*add, f"domain={domain}", f"data.path={text}"], cwd=tmp_path, **pipes)
        for domain, text in texts.items()
    }
    said = {domain: process.communicate(timeout=170) for domain, process in running.items()}
    codes = {domain: process.returncode for domain, process in running.items()}
    assert sorted(codes.values()) == [0, 1], said
    winner, loser = sorted(codes, key=lambda domain: codes[domain])
    assert f"another process holds {folder / 'forest.lock'}; wait for it to end" in said[loser][1]
    assert "Traceback" not in said[loser][1]
    after = Forest.open(folder)
    assert after.domains == ["code", "docs", winner]
    assert after.damages() == []
    assert {name: file_hashes(folder / "elms" / name) for name in before} == before
    assert not (folder / "corpus" / loser).exists()
