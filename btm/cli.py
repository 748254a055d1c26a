"""The ``btm`` command: every verb is a Hydra application over one configuration.

    btm run data.domains.law=law.jsonl data.domains.code=src/ train.tokens=2e6
    btm add forest=outputs/forest domain=tax data.path=tax.jsonl
    btm list forest=outputs/forest

Hydra composes YAML and overrides; everything below receives the typed :class:`btm.config.Config`. Overrides are
checked before Hydra sees them, so that an unknown key (also with ``+``) names the nearest known one. Exit codes:
0 done, 1 an error to repair, 2 a wrong configuration, 130 stopped by the user.
"""

import atexit
import contextlib
import errno
import importlib
import os
import sys
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn, cast

from btm.errors import BtmError, ConfigError

VERBS = {
    "demo": "train, merge, extend and evaluate a forest on text that is already on this machine",
    "run": "train a forest: seed, one ELM per domain, baselines, evaluation, report",
    "prepare": "turn text into token shards, and stop there",
    "add": "branch, train and join one more ELM, or import a model (domain=, data.path= or model.path=)",
    "remove": "remove an ELM and name those that still carry its data (domain=)",
    "list": "list the ELMs of a forest",
    "inspect": "show one ELM and verify its files (domain=)",
    "merge": "average ELMs into one Hugging Face model (merge.method=)",
    "evaluate": "perplexity of every model, average and ensemble on every domain",
    "generate": "continue a prompt with the ensemble or one model (generate.prompt=)",
    "report": "write the HTML report again",
    "status": "show how far a run is",
    "step": "run single steps of a plan here, without a driver (steps=, element=), or an exported task (<directory>)",
    "export-task": "write one ELM's training to a directory that runs on any machine (elm=, output=)",
    "import": "let an ELM that was trained from an exported task join its forest (<directory>)",
    "slurm": "list, follow or cancel a forest's Slurm jobs, or submit a run as an array job (action=)",
    "doctor": "show what this machine can run",
}
_CONFIG_DIR = Path(__file__).resolve().parent.parent / "configs"
_STORED_CONFIG_VERBS = {"add", "remove", "list", "inspect", "merge", "evaluate", "generate", "report", "status", "step"}
_STORED_CONFIG_VERBS |= {"export-task", "import"}
"""Verbs that work on an existing forest and take its configuration, with overrides on top."""
_COMMAND_KEYS = ("action", "element", "elm", "output", "steps", "task")
"""What one command was asked for, never what an earlier one on the same forest was."""
_MODULES = {"export-task": "export_task", "import": "import_task"}
"""Verb -> module, where the name of the verb cannot be one."""
_DIRECTORY_VERBS = ("step", "import")
"""Verbs whose first argument may be the directory of an exported task."""
_ENVIRONMENT_ERRORS = {
    errno.EACCES, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.ELOOP, errno.ENAMETOOLONG, errno.ENOSPC, errno.EPERM,
    errno.EROFS,
}  # fmt: skip
"""Errors of the system that the user can repair."""


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of the ``btm`` command."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_usage())
        sys.exit(0 if arguments else 2)
    if arguments[0] in ("-V", "--version"):
        print(importlib.import_module("importlib.metadata").version("branch-train-merge"))
        sys.exit(0)
    verb = arguments.pop(0)
    try:
        if verb not in VERBS:
            raise ConfigError([_unknown("command", verb, list(VERBS))])
        overrides = check_overrides(_with_task(verb, arguments))
    except BtmError as error:
        _fail(error)
    if verb == "demo" and not any(item.startswith("experiment=") for item in overrides):
        overrides.append("experiment=demo")
    _run_hydra(verb, overrides)


def module_of(verb: str) -> str:
    """Name of the module of ``btm.verbs`` that does what ``verb`` says."""
    return _MODULES.get(verb, verb)


def _with_task(verb: str, arguments: list[str]) -> list[str]:
    """``btm import <directory>`` is short for ``btm import task=<directory>``."""
    if verb not in _DIRECTORY_VERBS or not arguments or arguments[0].startswith("-") or "=" in arguments[0]:
        return arguments
    path = arguments[0].replace("\\", "\\\\").replace('"', '\\"')
    return [f'task="{path}"', *arguments[1:]]


def check_overrides(arguments: Sequence[str]) -> list[str]:
    """Refuse unknown keys and group options; let known keys of open tables (``data.domains.law``) be added.

    Raises:
        ConfigError: Listing every unknown key with the nearest known one.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    from btm.config_parse import key_problem

    checked, problems = [], []
    for argument in arguments:
        if argument.startswith("-") or "=" not in argument:
            checked.append(argument)
            continue
        try:
            parsed = OverridesParser.create().parse_override(argument)
        except HydraException as error:
            problems.append(
                f"{argument!r} is not an override ({str(error).splitlines()[0]}); write key=value, and a value with "
                f"other signs than letters and digits in double quotes inside single ones: 'key=\"a <value>\"'"
            )
            continue
        key = parsed.key_or_group or "="
        if key == "=":
            problems.append(f"{argument!r} is not an override; write key=value")
        elif key.startswith("hydra") or parsed.is_delete():
            checked.append(argument)
        elif (_CONFIG_DIR / key).is_dir() and "." not in key:
            problems += _group_problems(key, parsed.value())
            checked.append(argument.lstrip("+"))
        elif problem := key_problem(key):
            problems.append(problem)
        else:
            checked.append("++" + argument.lstrip("+"))
    if problems:
        raise ConfigError(problems)
    return checked


def _group_problems(group: str, value: Any) -> list[str]:
    options = sorted(file.stem for file in (_CONFIG_DIR / group).glob("*.yaml"))
    if isinstance(value, str) and value not in options:
        return [_unknown(f"choice for {group}", value, options)]
    return []


def _run_hydra(verb: str, overrides: list[str]) -> None:
    import hydra
    from hydra.core.config_store import ConfigStore
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import DictConfig, OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    from btm.config import Config
    from btm.config_parse import config_to_dict

    defaults = config_to_dict(Config())
    ConfigStore.instance().store(name="defaults", node=OmegaConf.create(defaults))

    def application(composed: DictConfig) -> None:
        try:
            raw = cast(dict[str, Any], OmegaConf.to_container(composed, resolve=True))
            config = _configuration(verb, raw, list(HydraConfig.get().overrides.task))
            importlib.import_module(f"btm.verbs.{module_of(verb)}").main(config)
        except BtmError as error:
            _fail(error)
        except OmegaConfBaseException as error:
            key = f"{error.full_key}: " if error.full_key else ""
            _fail(ConfigError([f"{key}{str(error).splitlines()[0]}"]))
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(141)
        except OSError as error:
            if error.errno not in _ENVIRONMENT_ERRORS:
                raise
            _fail(BtmError(f"{error.filename}: {error.strerror}; choose another path, or repair what hinders this one"))

    def job(composed: DictConfig) -> None:
        with _noticed_by_slurm():
            application(composed)

    sys.argv = [f"btm {verb}", *overrides]
    hydra.main(config_path=str(_CONFIG_DIR), config_name="btm", version_base="1.3")(job)()


@contextlib.contextmanager
def _noticed_by_slurm() -> Iterator[None]:
    """In a job of Hydra's submitit launcher: let the job end with the exit code of what ran in it.

    The launcher hands an exception to whoever submitted the sweep, as a result, and ends with 0, which Slurm calls
    COMPLETED; a ``SystemExit`` it does not hand over at all, and who has no accounting would wait for ever.
    """
    try:
        yield
    except BaseException as error:
        code = error.code if isinstance(error, SystemExit) else 1
        if "SUBMITIT_EXECUTOR" not in os.environ or not code:
            raise
        if not isinstance(error, SystemExit):
            traceback.print_exc()
        atexit.register(_end_with, code if isinstance(code, int) else 1)
        raise RuntimeError(f"the job of this run ended with exit code {code}; its log says why") from None


def _end_with(code: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _configuration(verb: str, raw: dict[str, Any], overrides: list[str]) -> Any:
    """Typed configuration: for a verb on an existing forest, the forest's own with the overrides on top."""
    from btm.config_parse import parse_config
    from btm.data_paths import expand_directories

    stored_path = Path(str(raw.get("forest"))) / "config.json"
    if verb in _STORED_CONFIG_VERBS and stored_path.is_file():
        stored = _stored_configuration(stored_path)
        stored |= {key: raw[key] for key in _COMMAND_KEYS}
        for override in overrides:
            _copy_key(raw, stored, override.lstrip("+~").split("=", 1)[0])
        stored["forest"] = raw["forest"]
        raw = stored
    return parse_config(expand_directories(raw))


def _stored_configuration(path: Path) -> dict[str, Any]:
    """The configuration that a forest holds, checked before overrides are put on top."""
    from btm.config_parse import parse_config
    from btm.errors import ForestError
    from btm.files import read_json

    stored = read_json(path)
    try:
        if not isinstance(stored, dict):
            raise ConfigError([f"a JSON object is needed, got {type(stored).__name__}"])
        parse_config(stored)
    except ConfigError as error:
        problems = "; ".join(error.problems)
        raise ForestError(f"{path} cannot be used ({problems}); restore it from a copy") from None
    return stored


def _copy_key(source: dict[str, Any], target: dict[str, Any], dotted: str) -> None:
    """Set ``target[a][b]`` to ``source[a][b]`` for ``a.b``; an experiment sets every key."""
    if dotted == "experiment":
        target.update(source)
        return
    *parents, last = dotted.split(".")
    for part in parents:
        source, target = source.get(part, {}), target.setdefault(part, {})
    if last in source:
        target[last] = source[last]


def _fail(error: BtmError) -> NoReturn:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(error.exit_code)


def _unknown(what: str, value: str, known: list[str]) -> str:
    import difflib

    near = difflib.get_close_matches(value, known, n=1, cutoff=0.5)
    return f"unknown {what} {value!r}; " + (f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}")


def _usage() -> str:
    width = max(map(len, VERBS))
    lines = ["usage: btm COMMAND [key=value ...]", "", "commands:"]
    lines += [f"  {verb:<{width}}  {text}" for verb, text in VERBS.items()]
    return "\n".join(
        [
            *lines,
            "",
            "btm COMMAND --cfg job   prints the configuration; btm COMMAND --help lists its groups",
            "btm COMMAND dry_run=true   prints the plan and stops",
        ]
    )


if __name__ == "__main__":
    main()
