"""Keep secrets out of everything that leaves this process: files, trackers, messages."""

import os
import re
from collections.abc import Mapping
from typing import Any

_SECRET_NAME = re.compile(r"(?i)api_?key|passw|secret|credential|(auth|access|bearer|hf|session)_?token|^token$")
_SECRET_VARIABLE = re.compile(r"(?i)key|token|secret|passw|credential")
_SHORTEST_SECRET = 8
_REDACTED = "[redacted]"


def names_secret(key: str) -> bool:
    """Whether ``key`` is named like something that must not be in a file (``api_key``, ``auth_token``)."""
    return _SECRET_NAME.search(key) is not None


def redact(value: Any) -> Any:
    """Copy of a JSON value without secrets: keys named like one, and texts that hold a secret of the environment."""
    if isinstance(value, Mapping):
        return {
            key: _REDACTED if names_secret(str(key)) and isinstance(item, str) else redact(item)
            for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        return [redact(item) for item in value]
    if isinstance(value, str):
        for variable, secret in os.environ.items():
            if len(secret) >= _SHORTEST_SECRET and _SECRET_VARIABLE.search(variable):
                value = value.replace(secret, _REDACTED)
    return value
