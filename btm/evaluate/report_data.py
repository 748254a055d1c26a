"""Everything that a report shows, read from a forest directory; what is missing or damaged is noted, never fatal."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from btm.errors import BtmError
from btm.evaluate.plots_curves import Curve
from btm.files import read_json
from btm.metrics import MetricsTail, Row, is_dev_row, latest_rows, number
from btm.records import Evaluation, ForestManifest, TrainResult
from btm.requests import TrainSpec

_Read = TypeVar("_Read")
_KIND_ORDER = ("seed", "sparse", "routers", "dense", "elm", "random")


@dataclass(frozen=True, slots=True)
class Run:
    """One training run of a forest."""

    name: str
    """Directory under ``runs/``: ``seed``, ``sparse``, ``dense``, ``elm/<domain>``, ``random/<index>``."""
    rows: list[Row]
    """Metric rows by update, one training and one dev row each at most."""
    spec: TrainSpec | None
    result: TrainResult | None


@dataclass(slots=True)
class ReportData:
    """What was found in a forest directory."""

    manifest: ForestManifest | None = None
    config: dict[str, Any] = field(default_factory=dict)
    evaluation: Evaluation | None = None
    later: dict[str, Evaluation] = field(default_factory=dict)
    """Added domain -> evaluation of the forest with it."""
    runs: list[Run] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    """Sentences about parts that are absent or damaged."""

    @property
    def is_sparse(self) -> bool:
        """Whether the run trained one model with expert layers instead of a forest."""
        ffn = self.config.get("ffn")
        layer = ffn.get("layer", "dense") if isinstance(ffn, dict) else "dense"
        named = self.evaluation is not None and "sparse" in self.evaluation.models
        return layer != "dense" or named or any(run.name == "sparse" for run in self.runs)


def load_report_data(forest_dir: Path) -> ReportData:
    """Read the manifest, the configuration, all evaluations, all training runs and the summary of a forest."""
    data = ReportData()
    data.manifest = _read(data, "the manifest", forest_dir / "forest.json", ForestManifest.load)
    data.config = _read(data, "the configuration", forest_dir / "config.json", _read_object) or {}
    data.evaluation = _read(data, "the evaluation", forest_dir / "evaluation.json", Evaluation.load)
    for path in sorted(forest_dir.glob("evaluation-with-*.json")):
        found = _read(data, "an evaluation", path, Evaluation.load)
        if found:
            data.later[path.stem.removeprefix("evaluation-with-")] = found
    if (forest_dir / "summary.json").is_file():
        data.summary = _read(data, "the summary", forest_dir / "summary.json", _read_object) or {}
    data.runs = _read_runs(data, forest_dir / "runs")
    return data


def loss_curves_of(data: ReportData) -> list[Curve]:
    """Training loss of every run over the tokens that its model had read, the seed phase included."""
    begins = _seed_tokens(data)
    # Auxiliary routers that learn after their model change nothing of the loss that training sees.
    runs = [run for run in data.runs if run.name != "routers"]
    return [_curve(run, [row for row in run.rows if not is_dev_row(row)], "train/loss", begins) for run in runs]


def dev_curves_of(data: ReportData) -> dict[str, list[Curve]]:
    """Dev loss by domain: the seed's, the sparse and the dense model's and the domain's own ELM's."""
    begins = _seed_tokens(data)
    domains = dict.fromkeys(
        key.removeprefix("eval/").removesuffix("/loss")
        for run in data.runs
        for row in run.rows
        for key in row
        if key.startswith("eval/") and key.endswith("/loss")
    )
    return {
        domain: [
            _curve(run, run.rows, f"eval/{domain}/loss", begins)
            for run in data.runs
            if run.name in ("seed", "sparse", "dense", f"elm/{domain}")
        ]
        for domain in domains
    }


def _curve(run: Run, rows: list[Row], key: str, seed_tokens: float) -> Curve:
    points = [
        (tokens, loss)
        for row in rows
        if (tokens := number(row, "tokens")) is not None and (loss := number(row, key)) is not None
    ]
    # Rows may count the tokens of the run alone or those of its ancestors too.
    own = run.name != "seed" and bool(points) and points[0][0] < seed_tokens
    offset = seed_tokens if own else 0.0
    return Curve(run.name, [tokens + offset for tokens, _ in points], [loss for _, loss in points])


def _seed_tokens(data: ReportData) -> float:
    seed = next((run for run in data.runs if run.name == "seed"), None)
    if seed is None:
        return 0.0
    return max((number(row, "tokens") or 0.0 for row in seed.rows), default=0.0)


def _read_runs(data: ReportData, runs_dir: Path) -> list[Run]:
    runs = []
    for path in runs_dir.rglob("metrics.jsonl"):
        name = path.parent.relative_to(runs_dir).as_posix()
        tail = MetricsTail(path)
        rows = latest_rows(tail.read())
        if tail.broken_lines:
            data.missing.append(f"runs/{name}/metrics.jsonl has {tail.broken_lines} broken lines; they are left out.")
        spec = _read(data, f"the request of the run {name}", path.parent / "spec.json", TrainSpec.load)
        result = _read(data, f"the result of the run {name}", path.parent / "result.json", TrainResult.load)
        runs.append(Run(name, rows, spec, result))
    if not runs:
        data.missing.append("No training metrics were found (runs/*/metrics.jsonl); there are no loss curves.")
    elms = [record.domain for record in data.manifest.elms] if data.manifest else []
    return sorted(runs, key=lambda run: _run_order(run.name, elms))


def _run_order(name: str, elms: list[str]) -> tuple[int, int, str]:
    kind, _, domain = name.partition("/")
    rank = _KIND_ORDER.index(kind) if kind in _KIND_ORDER else len(_KIND_ORDER)
    return rank, elms.index(domain) if domain in elms else len(elms), domain.zfill(6)


def _read(data: ReportData, what: str, path: Path, load: Callable[[Path], _Read]) -> _Read | None:
    if not path.is_file():
        data.missing.append(f"{what[0].upper()}{what[1:]} is missing ({path.name}).")
        return None
    try:
        return load(path)
    except (BtmError, OSError) as error:
        reason = str(error).replace(str(path.parent) + "/", "")
        data.missing.append(f"{what[0].upper()}{what[1:]} cannot be read: {reason}.")
        return None


def _read_object(path: Path) -> dict[str, Any]:
    value = read_json(path)
    return value if isinstance(value, dict) else {}
