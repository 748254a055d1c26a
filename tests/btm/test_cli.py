"""The command line: quick answers without heavy imports, mistakes with suggestions and exit code 2."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from btm.cli import VERBS, _configuration, check_overrides, module_of
from btm.config_parse import config_to_dict, parse_config
from btm.errors import ConfigError

HEAVY = {"torch", "transformers", "ray", "wandb", "datasets", "matplotlib", "deepspeed", "megatron"}


def btm(*arguments, cwd, **env):
    command = [sys.executable, "-m", "btm.cli", *arguments]
    return subprocess.run(
        command, cwd=cwd, capture_output=True, text=True, timeout=120, env={**os.environ, **env}, check=False
    )


@pytest.mark.parametrize(
    ("arguments", "exit_code"),
    [
        (["--help"], 0),
        (["--version"], 0),
        (["status", "forest=nowhere"], 1),
        (["list", "forest=nowhere"], 1),
        (["run", "train.lrr=1"], 2),
        (["run", "train.lr=-1"], 2),
        (["run", "data.domains.a=text.txt", "dry_run=true"], 0),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else "",
)
def test_answers_without_heavy_imports(tmp_path, arguments, exit_code):
    """Help, status, plans and configuration errors never load torch, ray or transformers."""
    command = [sys.executable, "-X", "importtime", "-m", "btm.cli", *arguments]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    modules = {line.split("|")[-1].strip().split(".")[0] for line in done.stderr.splitlines() if "|" in line}
    assert done.returncode == exit_code, done.stderr[-500:]
    assert modules & HEAVY == set()


def test_help_lists_every_command(tmp_path):
    output = btm("--help", cwd=tmp_path).stdout
    assert all(f"  {verb} " in output for verb in VERBS)


def test_every_command_has_a_module():
    folder = Path(check_overrides.__code__.co_filename).parent / "verbs"
    assert {file.stem for file in folder.glob("*.py") if "def main(" in file.read_text("utf-8")} == {
        module_of(verb) for verb in VERBS
    }


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.lrr=1", "unknown key train.lrr; did you mean train.lr?"),
        ("+train.lrr=1", "did you mean train.lr?"),
        ("++tran=1", "did you mean train?"),
        ("model=lama_4m", "did you mean 'llama_4m'?"),
        ("experiment=dmo", "did you mean 'demo'?"),
        ("launch.executr=ray", "did you mean launch.executor?"),
        ("train.lr", None),
        ("=3", "is not an override"),
        ("train.lr=[1", "is not an override"),
        ("generate.prompt=a <b>", "in double quotes"),
    ],
)
def test_wrong_overrides_name_the_nearest_key(override, words):
    """hydra#1928, #349, #620: a typo is refused, also with a plus, and the message suggests the key."""
    if words is None:
        assert check_overrides([override]) == [override]
        return
    with pytest.raises(ConfigError) as caught:
        check_overrides([override])
    assert words in str(caught.value)


def test_all_wrong_overrides_are_listed_at_once(tmp_path):
    done = btm("run", "trian.lr=3", "train.lrr=2", "model=lama", cwd=tmp_path)
    assert done.returncode == 2
    assert "3 problems" in done.stderr
    assert "Traceback" not in done.stderr


def test_an_unknown_command_suggests_one(tmp_path):
    done = btm("mrege", cwd=tmp_path)
    assert done.returncode == 2
    assert "did you mean 'merge'?" in done.stderr


def test_hydra_prints_the_configuration(tmp_path):
    done = btm("run", "data.domains.man-de=x", "train.lr=0.5", "--cfg", "job", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "man-de: x" in done.stdout
    assert "lr: 0.5" in done.stdout


def test_a_dry_run_shows_the_plan_and_leaves_nothing(tmp_path):
    done = btm("run", "data.domains.a=x", "data.domains.b=y", "dry_run=true", "baselines=all", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "elm/a" in done.stdout
    assert "random/1" in done.stdout
    assert "\x1b" not in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_a_pipe_that_closes_early_is_no_error(tmp_path):
    command = f"{sys.executable} -m btm.cli run data.domains.a=x dry_run=true | head -1"
    done = subprocess.run(command, shell=True, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert "Traceback" not in done.stderr


def test_a_command_does_not_repeat_what_an_earlier_one_on_the_forest_was_asked_for(tmp_path):
    values = {"data": {"domains": {"a": "a.txt"}}, "train": {"lr": 1e-3}, "steps": ["prepare", "seed"]}
    (tmp_path / "config.json").write_text(json.dumps(config_to_dict(parse_config(values))))
    typed = config_to_dict(parse_config({"forest": str(tmp_path), "task": "law-task"}))
    config = _configuration("step", typed, ["++task=law-task", f"++forest={tmp_path}"])
    assert (config.task, config.steps, config.train.lr) == ("law-task", [], 1e-3)
