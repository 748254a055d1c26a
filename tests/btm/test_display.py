import io
import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from btm.display import RunDisplay, TaskView

CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f\x9b]")


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def write_rows(path: Path, updates: range, *, per_update: int = 1024) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a", encoding="utf-8") as file:
        for update in updates:
            row = {"update": update, "tokens": (update - 200) * per_update, "train/loss": 4.5}
            file.write(json.dumps(row | {"train/tokens_per_s": 2048.0}) + "\n")


def view(path: Path, name: str = "elm/law", state: str = "running", note: str = "") -> TaskView:
    return TaskView(name, state, path, total_updates=200, total_tokens=204_800, note=note, first_update=200)


def test_a_log_gets_whole_plain_lines_at_the_interval(tmp_path: Path) -> None:
    path, clock, file = tmp_path / "metrics.jsonl", Clock(), io.StringIO()
    with RunDisplay(Console(file=file, width=40), log_interval_s=30, clock=clock) as display:
        for second in range(0, 91):
            clock.now = second
            write_rows(path, range(200 + second + 1, 200 + second + 2))
            display.update([view(path)])
        display.update([view(path, state="done")])
    lines = file.getvalue().splitlines()
    assert [re.sub(r"^\[[0-9:]{8}\] ", "", line) for line in lines] == [
        "elm/law: running, 1/200 updates, 1.02K/205K tokens, loss 4.500, 2.05K tokens/s, 1 min 40 s left",
        "elm/law: running, 31/200 updates, 31.7K/205K tokens, loss 4.500, 2.05K tokens/s, 1 min 24 s left",
        "elm/law: running, 61/200 updates, 62.5K/205K tokens, loss 4.500, 2.05K tokens/s, 1 min 10 s left",
        "elm/law: running, 91/200 updates, 93.2K/205K tokens, loss 4.500, 2.05K tokens/s, 54 s left",
        "elm/law: done, 91/200 updates, 93.2K/205K tokens, loss 4.500",
    ]


def test_many_tasks_stay_below_one_progress_line_per_ten_seconds(tmp_path: Path) -> None:
    clock, file = Clock(), io.StringIO()
    views = []
    for index in range(12):
        write_rows(tmp_path / str(index), range(201, 203))
        views.append(view(tmp_path / str(index), name=f"elm/{index}"))
    with RunDisplay(Console(file=file), clock=clock) as display:
        display.update(views)
        for second in range(1, 1201):
            clock.now = second
            display.update(views)
    assert 12 * 5 <= len(file.getvalue().splitlines()) - 12 <= 120


def test_a_log_never_holds_control_characters_or_markup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    log = tmp_path / "log.txt"
    script = (
        "import sys; from rich.console import Console; from btm.display import RunDisplay, TaskView\n"
        "with RunDisplay(Console(stderr=True) if sys.argv[1:] else None, log_interval_s=0) as display:\n"
        "    for state in ('waiting', 'running', 'running', 'failed'):\n"
        "        display.update([TaskView('x[bold]\\x1b[31m\\r', state, None, None, None, 'why\\x07\\nnext')])\n"
        "    display.log('[red]one[/red]\\r\\nt\\x1b[2Jwo')\n"
    )
    for arguments in ([], ["own console"]):
        with open(log, "wb") as file:
            subprocess.run([sys.executable, "-c", script, *arguments], stderr=file, check=True, timeout=60)
        text = log.read_text()
        assert not CONTROL.search(text)
        assert "[red]one[/red]\nt\\x1b[2Jwo\n" in text
        assert text.count("x[bold]\\x1b[31m\\r: running") == 2
        assert "why\\x07\\nnext" in text


def test_a_task_without_metrics_or_with_a_torn_file_is_shown(tmp_path: Path) -> None:
    torn = tmp_path / "metrics.jsonl"
    torn.write_text('{"update": 1, "tokens": null, "train/loss": NaN}\n{"upd')
    file = io.StringIO()
    with RunDisplay(Console(file=file)) as display:
        display.update(
            [view(tmp_path / "missing"), view(torn, name="elm/b"), TaskView("merge", "done", None, None, None)]
        )
    lines = [line.split("] ", 1)[1] for line in file.getvalue().splitlines()]
    assert lines == ["elm/law: running", "elm/b: running, 0/200 updates", "merge: done"]


def test_the_terminal_shows_bars_for_running_tasks_within_its_height(tmp_path: Path) -> None:
    path, file, clock = tmp_path / "metrics.jsonl", io.StringIO(), Clock()
    write_rows(path, range(201, 301))
    console = Console(file=file, force_terminal=True, width=100, height=24)
    views = [view(path, name=f"elm/{index}") for index in range(3)]
    views += [view(path, name=f"random/{index}", state="waiting") for index in range(40)]
    views += [TaskView(f"score/{index}", "waiting", None, None, None) for index in range(40)]
    with RunDisplay(console, clock=clock) as display:
        display.update(views)
        display.log("a [message]")
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", file.getvalue())
    frame = text[text.rindex("task ") :].splitlines()
    assert len(frame) < 24
    assert re.search(r"elm/0 +running +\u2501+.* 100/200 +102K +4\.500 +2\.05K +50 s", frame[1])
    assert "a [message]" in text
    assert "score/" not in text
    assert "83 tasks: 3 running, 80 waiting" in text


def test_a_real_terminal_gets_the_live_table(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write_rows(path, range(201, 250))
    script = (
        "import sys; from pathlib import Path; from btm.display import RunDisplay, TaskView\n"
        "with RunDisplay() as display:\n"
        "    display.update([TaskView('elm/law', 'running', Path(sys.argv[1]), 200, 204800, '', 200)])\n"
    )
    master, slave = pty.openpty()
    env = {**os.environ, "TERM": "xterm", "COLUMNS": "100", "LINES": "30"}
    with subprocess.Popen([sys.executable, "-c", script, str(path)], stderr=slave, env=env) as process:
        os.close(slave)
        output = b""
        while True:
            try:
                chunk = os.read(master, 65536)
            except OSError:
                break
            if not chunk:
                break
            output += chunk
        assert process.wait(60) == 0
    os.close(master)
    assert b"elm/law" in output
    assert b"49/200" in output
    assert b"\x1b[?25h" in output, "the cursor is shown again"


def test_following_a_hundred_tasks_opens_only_the_files_that_grew(tmp_path: Path, monkeypatch) -> None:
    opened = []

    def noted(path: Path, mode: str) -> io.BufferedReader:
        opened.append(path.name)
        return open(path, mode)

    monkeypatch.setattr("btm.metrics.open", noted, raising=False)
    views = []
    for index in range(100):
        write_rows(tmp_path / str(index), range(201, 401))
        views.append(view(tmp_path / str(index), name=str(index)))
    with RunDisplay(Console(file=io.StringIO())) as display:
        display.update(views)
        assert len(opened) == 100
        write_rows(tmp_path / "7", range(401, 402))
        for _ in range(10):
            display.update(views)
    assert opened[100:] == ["7"]
