import pytest

from launch.logs import end_of_log


def write(tmp_path, data):
    path = tmp_path / "log.txt"
    path.write_bytes(data)
    return path


def test_last_lines_without_blank_ones(tmp_path):
    path = write(tmp_path, b"".join(b"line %d\n\n" % index for index in range(50)))
    assert end_of_log(path, 3) == "line 47\nline 48\nline 49"
    assert end_of_log(path).count("\n") == 19
    assert end_of_log(path, 0) == ""


def test_what_came_before_the_start_is_passed_over(tmp_path):
    path = write(tmp_path, b"first attempt\nsecond attempt\nits end\n")
    assert end_of_log(path, start=len(b"first attempt\n")) == "second attempt\nits end"
    assert end_of_log(path, 1, start=len(b"first attempt\n")) == "its end"
    assert end_of_log(path, start=path.stat().st_size) == ""
    assert end_of_log(path, start=1 << 20) == ""


@pytest.mark.parametrize(
    ("data", "shown"),
    [
        (b"\x1b[31mred\x1b[0m \x1b]0;title\x07end\n", "red end"),
        (b"10%\r50%\r100%\r\n", "100%"),
        (b"bell\x07 nul\x00 back\x08\n", "bell nul back"),
        ("right \u202eto left\u202c\n".encode(), "right to left"),
        (b"bad \xff\xfe bytes", "bad \ufffd\ufffd bytes"),
        (b"a\tb\x1b[2J\x1b(B", "a    b(B"),
        (b"", ""),
    ],
)
def test_nothing_reaches_the_terminal_but_text(tmp_path, data, shown):
    assert end_of_log(write(tmp_path, data)) == shown


def test_only_the_end_of_a_huge_log_is_read(tmp_path):
    path = tmp_path / "log.txt"
    with open(path, "wb") as file:
        file.truncate(1 << 40)
        file.seek(1 << 40)
        file.write(b"\nthe end\n" + b"x" * 1000)
    last = end_of_log(path).splitlines()
    assert last[-2] == "the end"
    assert last[-1] == "x" * 500 + " ..."


def test_a_missing_log_is_empty(tmp_path):
    assert end_of_log(tmp_path / "missing") == ""
    assert end_of_log(tmp_path) == ""
