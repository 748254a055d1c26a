"""How to repeat a run: the command with every key that differs from its default, versions, the whole configuration."""

import importlib.metadata
import json
import platform
import re
import shlex
from collections.abc import Iterator, Mapping
from typing import Any

from btm.config import Config
from btm.config_parse import config_to_dict
from btm.evaluate import report_html as web
from btm.evaluate.report_data import ReportData
from btm.redaction import redact

_PACKAGES = ("branch-train-merge", "torch", "transformers", "tokenizers", "safetensors", "numpy")
_UNQUOTED = re.compile(r"[A-Za-z0-9_./:@+-]+")
_NOT_TEXT = re.compile(r"(?i)null|true|false|nan|[+-]?inf(inity)?|[+-]?[0-9_.]+(e[+-]?[0-9]+)?")


def reproduce_parts(data: ReportData) -> list[str]:
    """Markup of the section; a sentence alone when the configuration is missing."""
    if not data.config:
        return [web.paragraph("The configuration (config.json) is missing.")]
    config = redact(data.config)
    command = " \\\n    ".join(["btm run", *(shlex.quote(item) for item in overrides(config))])
    versions = ", ".join(f"{name} {version}" for name, version in _versions())
    parts = [
        web.paragraph("The run again, with every key that differs from its default:"),
        web.preformatted(command),
        web.paragraph(f"This report was written with {versions}.", soft=True),
    ]
    if data.manifest:
        parts.append(web.paragraph(f"Tokenizer SHA-256: {data.manifest.tokenizer_sha256}.", soft=True))
    return [*parts, web.details("The whole configuration", web.preformatted(json.dumps(config, indent=2)))]


def overrides(config: Mapping[str, Any]) -> list[str]:
    """``key=value`` in Hydra's notation for every key of ``config`` whose value is not the default."""
    return list(_differences(config, config_to_dict(Config.model_validate({})), ""))


def _differences(given: Mapping[str, Any], default: Mapping[str, Any], prefix: str) -> Iterator[str]:
    for key, value in given.items():
        usual = default.get(key)
        if value == usual:
            continue
        if isinstance(value, Mapping) and value:
            yield from _differences(value, usual if isinstance(usual, Mapping) else {}, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}={_hydra_value(value)}"


def _hydra_value(value: Any) -> str:
    if isinstance(value, str):
        if _UNQUOTED.fullmatch(value) and not _NOT_TEXT.fullmatch(value):
            return value
        escaped = re.sub(r"(\\*)'", lambda found: found[1] * 2 + r"\'", value)
        trailing = len(escaped) - len(escaped.rstrip("\\"))
        return f"'{escaped}{chr(92) * trailing}'"
    if isinstance(value, list | tuple):
        return "[" + ",".join(_hydra_value(item) for item in value) + "]"
    return json.dumps(value)


def _versions() -> Iterator[tuple[str, str]]:
    yield "Python", platform.python_version()
    for package in _PACKAGES:
        try:
            yield package, importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
