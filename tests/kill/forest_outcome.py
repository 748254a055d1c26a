"""Everything of a forest that must not depend on kills, as one dictionary that can be compared."""

import json
import re
from pathlib import Path
from typing import Any

from btm.files import sha256_of_file

_TIMES = {"time", "seconds", "created", "train/tokens_per_s", "train/flops_per_s", "train/peak_share"}
_TIMES |= {"spec_sha256", "model_dir"}
"""A request may name the cost of its parents, so its hash is no more equal than two clocks; a copied forest keeps the
paths that it was made with."""


def outcome(forest: Path) -> dict[str, Any]:
    """Path -> hash or content without times."""
    found: dict[str, Any] = {}
    for path in sorted(forest.rglob("*")):
        name = str(path.relative_to(forest))
        if path.suffix in (".safetensors", ".npy", ".bin", ".idx"):
            found[name] = sha256_of_file(path)
        elif path.name in (
            "forest.json",
            "experts.json",
            "evaluation.json",
            "summary.json",
            "result.json",
            "prepare.json",
        ):
            found[name] = _without_times(json.loads(path.read_text()), forest)
        elif path.name == "metrics.jsonl":
            found[name] = [_without_times(json.loads(line), forest) for line in path.read_text().splitlines()]
        elif path.name == "log.txt":
            found[f"{name}: threads"] = sorted(set(re.findall(r"with (\d+) threads", path.read_text())))
        else:
            found[name] = "directory" if path.is_dir() else "file"
    found.update(_scores(forest))
    return found


def leftovers(forest: Path) -> list[str]:
    """What killed writers left behind, or what was taken for damaged."""
    return [
        str(path.relative_to(forest))
        for path in forest.rglob("*")
        if path.name.startswith((".tmp", "damaged-")) or path.name.endswith((".tmp", ".partial"))
    ]


def differences(expected: dict[str, Any], got: dict[str, Any]) -> list[str]:
    """Names that are on one side only or differ."""
    lines = []
    for name in sorted({*expected, *got}):
        left, right = expected.get(name, "missing"), got.get(name, "missing")
        if left != right:
            lines.append(f"{name}: {str(left)[:300]} | {str(right)[:300]}")
    return lines


def _scores(forest: Path) -> dict[str, Any]:
    import numpy as np

    found = {}
    for path in forest.glob("scores/**/*.npz"):
        with np.load(path) as arrays:
            found[str(path.relative_to(forest))] = {name: arrays[name].tobytes() for name in arrays.files}
    return found


def _without_times(value: Any, forest: Path) -> Any:
    if isinstance(value, dict):
        return {key: _without_times(item, forest) for key, item in value.items() if key not in _TIMES}
    if isinstance(value, list):
        return [_without_times(item, forest) for item in value]
    return value.replace(str(forest), "") if isinstance(value, str) else value
