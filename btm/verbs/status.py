"""``btm status``: how far a run is, read from the files that its workers write; nothing is started or locked."""

import json
from pathlib import Path

from rich.table import Table

from btm.config import Config
from btm.errors import ForestError
from btm.files import read_json
from btm.metrics import MetricsTail, is_dev_row, latest_rows
from btm.plan_table import human_count
from btm.session import console_for


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
    table = Table(title=f"runs in {config.forest}", title_justify="left")
    for column in ("run", "state", "updates", "tokens", "loss", "tokens/s"):
        table.add_column(column, justify="left" if column in ("run", "state") else "right")
    for row in rows:
        loss, speed = row["loss"], row["tokens_per_s"]
        table.add_row(
            row["run"],
            row["state"],
            f"{row['updates']:,} of {row['total_updates']:,}",
            human_count(row["tokens"]),
            f"{loss:.3f}" if loss is not None else "-",
            human_count(speed) if speed is not None else "-",
        )
    console_for(config).print(table)


def _row(directory: Path, runs: Path) -> dict[str, object]:
    spec = read_json(directory / "spec.json")
    row: dict[str, object] = {"run": str(directory.relative_to(runs)), "updates": None}
    if "last_update" not in spec:
        return row
    rows = latest_rows(MetricsTail(directory / "metrics.jsonl").read())
    training = [item for item in rows if not is_dev_row(item)]
    last = training[-1] if training else {}
    finished = (directory / "result.json").is_file()
    return row | {
        "state": "finished" if finished else "begun",
        "updates": int(last.get("update", spec["first_update"])) - spec["first_update"],
        "total_updates": spec["last_update"] - spec["first_update"],
        "tokens": last.get("tokens", 0),
        "loss": last.get("train/loss"),
        "tokens_per_s": last.get("train/tokens_per_s"),
    }
