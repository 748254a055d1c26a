import json
from pathlib import Path

from btm.metrics import MetricsTail, latest_rows, number


def append(path: Path, text: str) -> None:
    with open(path, "a", encoding="utf-8") as file:
        file.write(text)


def test_a_tail_gives_each_row_once_and_waits_for_whole_lines(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    tail = MetricsTail(path)
    assert tail.read() == []
    append(path, '{"update": 1}\n{"update": 2}\n{"upd')
    assert [row["update"] for row in tail.read()] == [1, 2]
    assert tail.read() == []
    append(path, 'ate": 3}\n')
    assert tail.read() == [{"update": 3}]


def test_a_line_torn_by_a_kill_costs_only_that_row(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    tail = MetricsTail(path)
    append(path, '{"update": 1}\n{"update": 2, "train/lo{"update": 2, "train/loss": 4.0}\nrubbish\n[1]\n\n')
    assert tail.read() == [{"update": 1}, {"update": 2, "train/loss": 4.0}]
    assert tail.broken_lines == 2


def test_a_replaced_or_shortened_file_is_read_anew(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    append(path, '{"update": 1}\n{"update": 2}\n')
    tail = MetricsTail(path)
    assert len(tail.read()) == 2
    path.write_text('{"update": 9}\n')
    assert tail.read() == [{"update": 9}]
    (tmp_path / "new").write_text('{"update": 7}\n{"update": 8}\n{"update": 9}\n')
    (tmp_path / "new").replace(path)
    assert [row["update"] for row in tail.read()] == [7, 8, 9]


def test_following_reads_only_what_is_new(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    append(path, json.dumps({"update": 1, "pad": "x" * 3_000_000}) + "\n")
    tail = MetricsTail(path)
    assert len(tail.read()) == 1
    append(path, '{"update": 2}\n')
    assert tail.read() == [{"update": 2}]


def test_latest_rows_keep_what_a_restarted_worker_wrote_last() -> None:
    rows = [
        {"update": 10, "train/loss": 5.0},
        {"update": 20, "train/loss": 4.0},
        {"update": 20, "eval/law/loss": 4.5},
        {"update": 20, "train/loss": 4.1},
        {"note": "no update"},
    ]
    kept = latest_rows(rows)
    assert [row.get("train/loss") for row in kept] == [5.0, 4.1, None]


def test_numbers_must_be_finite() -> None:
    row = {"a": 1, "b": float("nan"), "c": float("inf"), "d": "1", "e": True}
    assert [number(row, key) for key in "abcdef"] == [1.0, None, None, None, None, None]
