"""``btm status``: how far a run is, read from the files that its workers write; nothing is started or locked."""

import json
from pathlib import Path
from typing import Any

from btm.config import Config
from btm.errors import ForestError
from btm.files import read_json
from btm.metrics import MetricsTail, is_dev_row, latest_rows
from btm.requests import TrainSpec
from btm.session import console_for
from btm.tables import format_count, rows_table


def main(config: Config) -> None:
    """Print one row per training of the forest.

    Raises:
        ForestError: If there is no run at ``config.forest``.
    """
    runs = Path(config.forest) / "runs"
    if not runs.is_dir():
        raise ForestError(f"{config.forest} holds no run; `btm run forest={config.forest}` starts one")
    rows = [_row(spec.parent, runs) for spec in sorted(runs.glob("**/spec.json"))]
    rows = [row for row in rows if row["updates"] is not None]
    if config.output_json:
        print(json.dumps(rows, indent=2))
        return
    headings = ("run", "state", "updates", "tokens", "loss", "tokens/s")
    cells = [
        (
            row["run"],
            row["state"],
            f"{row['updates']:,} of {row['total_updates']:,}",
            format_count(row["tokens"]),
            "-" if row["loss"] is None else f"{row['loss']:.3f}",
            "-" if row["tokens_per_s"] is None else format_count(row["tokens_per_s"]),
        )
        for row in rows
    ]
    console_for(config).print(rows_table(headings, cells, title=f"runs in {config.forest}"))


def _row(directory: Path, runs: Path) -> dict[str, Any]:
    raw = read_json(directory / "spec.json")
    row: dict[str, Any] = {"run": str(directory.relative_to(runs)), "updates": None}
    if "last_update" not in raw:
        return row
    spec = TrainSpec.load(directory / "spec.json")
    rows = latest_rows(MetricsTail(directory / "metrics.jsonl").read())
    training = [item for item in rows if not is_dev_row(item)]
    last = training[-1] if training else {}
    finished = (directory / "result.json").is_file()
    return row | {
        "state": "finished" if finished else "begun",
        "updates": int(last.get("update", spec.first_update)) - spec.first_update,
        "total_updates": spec.last_update - spec.first_update,
        "tokens": last.get("tokens", 0),
        "loss": last.get("train/loss"),
        "tokens_per_s": last.get("train/tokens_per_s"),
    }
