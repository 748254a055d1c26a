import json

import pytest

from btm.train.metrics import MetricsFile


def written(path, updates) -> None:
    file = MetricsFile(path, last_update=0)
    for update in updates:
        file.append({"update": update, "train/loss": 0.1 * update})
    file.close()


def test_rows_behind_the_resumed_update_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    written(path, [2, 4, 6, 8])
    written_before = path.read_bytes()
    MetricsFile(path, last_update=8).close()
    assert path.read_bytes() == written_before
    file = MetricsFile(path, last_update=5)
    file.append({"update": 6})
    file.close()
    assert [json.loads(line)["update"] for line in path.read_text().splitlines()] == [2, 4, 6]


@pytest.mark.parametrize("torn", ['{"update": 3, "train/lo', '{"update": 3}', "\x00\x00\x00", "[1]\n", "17\n"])
def test_a_torn_last_line_is_dropped(tmp_path, torn):
    path = tmp_path / "metrics.jsonl"
    written(path, [1, 2])
    whole = path.read_bytes()
    with open(path, "a") as file:
        file.write(torn)
    MetricsFile(path, last_update=9).close()
    assert path.read_bytes() == whole


def test_numbers_that_json_does_not_know_are_refused(tmp_path):
    file = MetricsFile(tmp_path / "metrics.jsonl", last_update=0)
    with pytest.raises(ValueError, match="JSON"):
        file.append({"update": 1, "train/loss": float("nan")})
    file.close()
