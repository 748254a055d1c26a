import json
import os
import struct
import subprocess
import sys
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from btm.config_launch import TrackerName, TrackingConfig
from btm.errors import ConfigError
from btm.redaction import redact
from btm.tracking import MetricsMirror, RunIdentity, make_tracker

OFFLINE = TrackingConfig(name=TrackerName.wandb, mode="offline", project="btm-test")
FAKE_KEY = "0123456789abcdef0123456789abcdef01234567"


def write_rows(path: Path, updates: range) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a", encoding="utf-8") as file:
        for update in updates:
            file.write(json.dumps({"update": update, "tokens": update * 1024, "train/loss": 5 - update / 100}) + "\n")
            if update % 10 == 0:
                file.write(json.dumps({"update": update, "tokens": update * 1024, "eval/law/loss": 5.1}) + "\n")


class MemoryRun:
    """A tracking service that keeps everything in memory."""

    def __init__(self, identity: RunIdentity, config: Mapping[str, Any]) -> None:
        self.identity, self.config = identity, config
        self.rows: list[tuple[int, dict[str, Any]]] = []
        self.values: dict[str, Any] = {}
        self.finished = False

    def log(self, row: Mapping[str, Any], step: int) -> None:
        self.rows.append((step, dict(row)))

    def summary(self, values: Mapping[str, Any]) -> None:
        self.values.update(values)

    def finish(self) -> None:
        self.finished = True


def mirror(forest: Path, runs: list[MemoryRun]) -> MetricsMirror:
    def open_run(identity: RunIdentity, config: Mapping[str, Any]) -> MemoryRun:
        runs.append(MemoryRun(identity, config))
        return runs[-1]

    return MetricsMirror(open_run, forest_name="demo", forest_dir=forest)


def wandb_records(path: Path) -> Iterator[Any]:
    """Records of a ``.wandb`` file: a LevelDB-type log of protocol buffers in blocks of 32 KiB."""
    from wandb.proto import wandb_internal_pb2

    data, offset, message = path.read_bytes(), 7, b""
    while offset + 7 <= len(data):
        if 32768 - offset % 32768 < 7:
            offset += 32768 - offset % 32768
            continue
        _, length, kind = struct.unpack("<IHB", data[offset : offset + 7])
        message += data[offset + 7 : offset + 7 + length]
        offset += 7 + length
        if kind in (1, 4):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(message)
            yield record
            message = b""


def wandb_history(forest: Path, run_id: str) -> list[dict[str, Any]]:
    """Rows of all segments of one offline run, in the order in which they would be uploaded."""
    rows = []
    segments = sorted(forest.glob(f"wandb/offline-run-*/run-{run_id}.wandb"), key=lambda path: path.stat().st_mtime_ns)
    for segment in segments:
        for record in wandb_records(segment):
            if record.WhichOneof("record_type") == "history":
                items = record.history.item
                rows.append({item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in items})
    return rows


def wandb_run_record(forest: Path, run_id: str) -> Any:
    path = next(forest.glob(f"wandb/offline-run-*/run-{run_id}.wandb"))
    return next(record.run for record in wandb_records(path) if record.WhichOneof("record_type") == "run")


def test_every_row_is_sent_once_in_order(tmp_path: Path) -> None:
    runs: list[MemoryRun] = []
    tracker, path = mirror(tmp_path, runs), tmp_path / "runs/elm/law/metrics.jsonl"
    tracker.follow("elm/law", path, {"lr": 0.1})
    tracker.follow("elm/law", path, {"lr": 0.1})
    tracker.poll()
    write_rows(path, range(1, 11))
    tracker.poll()
    tracker.poll()
    write_rows(path, range(11, 21))
    tracker.close()
    assert len(runs) == 1
    assert [step for step, row in runs[0].rows if "train/loss" in row] == list(range(1, 21))
    assert [step for step, row in runs[0].rows if "eval/law/loss" in row] == [10, 20]
    assert runs[0].finished


def test_updates_that_a_restarted_worker_repeats_are_not_sent_again(tmp_path: Path) -> None:
    runs: list[MemoryRun] = []
    tracker, path = mirror(tmp_path, runs), tmp_path / "metrics.jsonl"
    tracker.follow("seed", path, {})
    write_rows(path, range(1, 16))
    tracker.poll()
    write_rows(path, range(6, 31))
    tracker.close()
    steps = [step for step, _ in runs[0].rows]
    assert steps == sorted(steps)
    assert [step for step, row in runs[0].rows if "train/loss" in row] == list(range(1, 31))


def test_a_restarted_driver_continues_the_same_run(tmp_path: Path) -> None:
    """Thread 38: a requeued job must not start a new run."""
    runs: list[MemoryRun] = []
    path = tmp_path / "metrics.jsonl"
    for updates in (range(1, 11), range(11, 21)):
        tracker = mirror(tmp_path, runs)
        tracker.follow("seed", path, {})
        write_rows(path, updates)
        tracker.close()
    assert runs[0].identity == runs[1].identity
    assert [row["update"] for run in runs for _, row in run.rows if "train/loss" in row] == list(range(1, 21))


def test_without_its_state_file_everything_is_replayed_to_a_new_run(tmp_path: Path) -> None:
    """Thread 39: our JSON lines are the truth, trackers are mirrors and can be replayed."""
    runs: list[MemoryRun] = []
    path = tmp_path / "metrics.jsonl"
    write_rows(path, range(1, 11))
    for content in (None, "not json", '{"sent": 3}'):
        if content is not None:
            (tmp_path / "tracking.json").write_text(content)
        tracker = mirror(tmp_path, runs)
        tracker.follow("seed", path, {})
        tracker.close()
    assert len({run.identity.run_id for run in runs}) == 3
    assert runs[0].rows == runs[1].rows == runs[2].rows


def test_ids_differ_between_tasks_and_forests(tmp_path: Path) -> None:
    one, two = mirror(tmp_path / "a", []), mirror(tmp_path / "b", [])
    assert len({one.run_id("seed"), one.run_id("dense"), two.run_id("seed")}) == 3


def test_a_service_that_fails_is_reported_once_and_left_alone(tmp_path: Path) -> None:
    class Broken(MemoryRun):
        def log(self, row: Mapping[str, Any], step: int) -> None:
            raise ConnectionError("no route to host")

    path = tmp_path / "metrics.jsonl"
    tracker = MetricsMirror(Broken, forest_name="demo", forest_dir=tmp_path)
    tracker.follow("seed", path, {})
    write_rows(path, range(1, 4))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        tracker.poll()
        write_rows(path, range(4, 8))
        tracker.poll()
        tracker.follow("seed", path, {})
        tracker.close()
    assert [str(warning.message)[:24] for warning in caught] == ["tracking of seed stopped"]
    assert "no route to host" in str(caught[0].message)


def test_tracker_none_imports_no_wandb_and_writes_nothing(tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path\n"
        "from btm.config_launch import TrackingConfig; from btm.tracking import make_tracker\n"
        "tracker = make_tracker(TrackingConfig(), forest_name='f', forest_dir=Path(sys.argv[1]))\n"
        "tracker.follow('seed', Path('x'), {}); tracker.poll(); tracker.summary('seed', {}); tracker.close()\n"
        "assert not {'wandb', 'torch', 'ray', 'transformers'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=True, timeout=60)
    assert list(tmp_path.iterdir()) == []


def test_online_without_a_key_is_refused_before_anything_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.setenv("HOME", str(tmp_path))
    online = TrackingConfig(name=TrackerName.wandb, mode="online")
    with pytest.raises(ConfigError, match="WANDB_API_KEY"):
        make_tracker(online, forest_name="f", forest_dir=tmp_path)
    (tmp_path / ".netrc").write_text(f"machine api.wandb.ai login user password {FAKE_KEY}\n")
    (tmp_path / ".netrc").chmod(0o600)
    make_tracker(online, forest_name="f", forest_dir=tmp_path / "forest")


def test_secrets_are_redacted_by_name_and_by_value(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_notarealtoken")
    given = {"api_key": "x", "train": {"tokens": 5, "note": "with hf_notarealtoken"}, "list": ["hf_notarealtoken"]}
    assert redact(given) == {
        "api_key": "[redacted]",
        "train": {"tokens": 5, "note": "with [redacted]"},
        "list": ["[redacted]"],
    }


def test_a_real_offline_wandb_run_is_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """R15, thread 38: one group, one run per task, two segments of one id, no key in any file."""
    monkeypatch.setenv("WANDB_API_KEY", FAKE_KEY)
    monkeypatch.setenv("HF_TOKEN", "hf_notarealtoken")
    paths = {name: tmp_path / "runs" / name / "metrics.jsonl" for name in ("seed", "elm/law")}
    ids = {}
    for updates in (range(1, 11), range(11, 21)):
        tracker = make_tracker(OFFLINE, forest_name="demo-forest", forest_dir=tmp_path)
        assert isinstance(tracker, MetricsMirror)
        for name, path in paths.items():
            tracker.follow(name, path, {"train": {"lr": 0.002}, "note": "hf_notarealtoken"})
            write_rows(path, updates)
            ids[name] = tracker.run_id(name)
        tracker.poll()
        tracker.summary("seed", {"ledger/tokens": 123})
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            tracker.close()
    for name, run_id in ids.items():
        assert len(list(tmp_path.glob(f"wandb/offline-run-*/run-{run_id}.wandb"))) == 2
        rows = wandb_history(tmp_path, run_id)
        assert [row["update"] for row in rows] == list(range(1, 21))
        assert [row["_step"] for row in rows] == list(range(1, 21))
        assert [row["train/loss"] for row in rows] == [5 - update / 100 for update in range(1, 21)]
        assert [row["update"] for row in rows if "eval/law/loss" in row] == [10, 20]
        run = wandb_run_record(tmp_path, run_id)
        assert (run.run_group, run.display_name, run.project) == ("demo-forest", name, "btm-test")
        config = {item.key: json.loads(item.value_json) for item in run.config.update}
        assert config["train"] == {"lr": 0.002}
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(written) > 8
    for path in written:
        content = path.read_bytes()
        assert FAKE_KEY.encode() not in content
        assert b"hf_notarealtoken" not in content
    assert os.environ["WANDB_API_KEY"] == FAKE_KEY
