"""Every command and every line of Python in the README works."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from btm.cli import VERBS, check_overrides

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
COMMANDS = [
    shlex.split(line, comments=True)
    for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    for line in block.splitlines()
    if line.strip()
]


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_a_command_of_the_readme_is_accepted(command):
    program, name, *arguments = command
    if program == "make":
        assert re.search(rf"^{name}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
        return
    assert program == "btm"
    assert name in VERBS
    check_overrides(arguments)


def test_the_make_targets_of_the_readme_exist():
    targets = re.findall(r"`make ([a-z-]+)`", README)
    assert targets
    makefile = (ROOT / "Makefile").read_text()
    assert [target for target in targets if not re.search(rf"^{target}:", makefile, re.MULTILINE)] == []


def test_the_python_of_the_readme_runs(forest, tmp_path):
    (block,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    shutil.copytree(forest, tmp_path / "outputs/demo")
    done = subprocess.run(
        [sys.executable, "-c", block], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, timeout=150, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-1000:]
    assert (tmp_path / "outputs/merged/model.safetensors").is_file()
    assert "['code', 'docs']" in done.stdout


def test_every_method_of_the_tables_is_in_the_readme_and_has_a_yaml():
    from btm.merge.methods import MERGE_METHODS

    for name, method in MERGE_METHODS.items():
        assert f"| `{name}` |" in README
        assert (ROOT / "configs/merge" / f"{name}.yaml").is_file()
        assert method.reference.startswith("https://arxiv.org/abs/")


def test_links_of_the_readme_exist():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("http") or (ROOT / target).exists(), target
