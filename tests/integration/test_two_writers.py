"""Two processes that change one forest at the same time."""

import json
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from btm.forest import Forest, file_hashes


def test_of_two_adds_at_once_one_joins_and_the_other_is_told(forest, corpora, tmp_path):
    folder = tmp_path / "forest"
    shutil.copytree(forest, folder)
    before = {name: file_hashes(folder / "elms" / name) for name in ("code", "docs")}
    other = tmp_path / "other.jsonl"
    stdlib = sorted(Path(sysconfig.get_path("stdlib")).glob("[n-z]*.py"))
    other.write_text("".join(json.dumps({"text": path.read_text("utf-8")}) + "\n" for path in stdlib[:40]))
    texts = {"mail": corpora / "mail.jsonl", "other": other}
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
