"""Two processes that change one forest at the same time."""

import json
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
from pathlib import Path

from btm.forest import Forest, file_hashes
from tests.conftest import run_btm

ROOT = Path(__file__).parents[2]
PAUSED = """
import os, signal, sys
from tests.btm.chosen_moments import at_change
from btm.cli import main

def holds_the_lock():
    descriptors = (f"/proc/self/fd/{number}" for number in os.listdir("/proc/self/fd"))
    return any(os.readlink(path).endswith("forest.lock") for path in descriptors if os.path.exists(path))

at_change(holds_the_lock, lambda: os.kill(os.getpid(), signal.SIGSTOP))
sys.exit(main())
"""
"""`btm`, stopped before its first change of a file while it has the forest's lock."""


def test_of_two_adds_at_once_one_joins_and_the_other_is_told(forest, corpora, tmp_path):
    folder = tmp_path / "forest"
    shutil.copytree(forest, folder)
    before = {name: file_hashes(folder / "elms" / name) for name in ("code", "docs")}
    other = tmp_path / "other.jsonl"
    stdlib = sorted(Path(sysconfig.get_path("stdlib")).glob("[n-z]*.py"))
    other.write_text("".join(json.dumps({"text": path.read_text("utf-8")}) + "\n" for path in stdlib[:40]))
    add = ("add", f"forest={folder}", "data.on_error=skip")
    winner, loser = "mail", "other"
    first = subprocess.Popen(
        [sys.executable, "-c", PAUSED, *add, f"domain={winner}", f"data.path={corpora / 'mail.jsonl'}"],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert os.WIFSTOPPED(os.waitpid(first.pid, os.WUNTRACED)[1])
    second = run_btm(*add, f"domain={loser}", f"data.path={other}", cwd=tmp_path, check=False)
    first.send_signal(signal.SIGCONT)
    said = first.communicate(timeout=170)[1]
    assert (first.returncode, second.returncode) == (0, 1), said + second.stderr
    assert f"another process holds {folder / 'forest.lock'}; wait for it to end" in second.stderr
    assert "Traceback" not in second.stderr
    after = Forest.open(folder)
    assert after.domains == ["code", "docs", winner]
    assert after.damages() == []
    assert {name: file_hashes(folder / "elms" / name) for name in before} == before
    assert not (folder / "corpus" / loser).exists()
