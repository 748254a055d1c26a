import gzip
import json
import os
import pickle

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from btm.config_data import OnError
from btm.corpus import readers
from btm.corpus.faults import Faults
from btm.corpus.files_of_domain import find_files
from btm.corpus.readers import read_documents
from btm.errors import DataError

TEXTS = ["one", "two \u65e5\u672c\r\nlines\n", "three\ttabs ", "four"]


def lines(texts):
    return "".join(json.dumps({"text": text, "n": 1}) + "\n" for text in texts).encode()


def read(path, on_error=OnError.stop, text_field="text"):
    faults = Faults("law", on_error)
    files = find_files("law", [str(path)])
    return [document.text for document in read_documents(files, text_field=text_field, faults=faults)], faults


def write_dataset(path, texts):
    import datasets

    datasets.Dataset.from_dict({"text": texts, "n": [1] * len(texts)}).save_to_disk(str(path))


def write_datasets(path, texts):
    import datasets

    splits = {name: datasets.Dataset.from_dict({"text": part}) for name, part in (("a", texts[:2]), ("b", texts[2:]))}
    datasets.DatasetDict(splits).save_to_disk(str(path))


def write_folder(path, texts):
    for number, text in enumerate(texts):
        folder = path / f"{number // 2}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number}.txt").write_bytes(text.encode())
    (path / "picture.png").write_bytes(b"\x89PNG")
    (path / ".hidden.txt").write_text("hidden")


def two_frames(data):
    return zstandard.compress(data[:37]) + zstandard.compress(data[37:])


FORMS = {
    "a.jsonl": lambda p: p.write_bytes(lines(TEXTS)),
    "a.json": lambda p: p.write_bytes(b"\xef\xbb\xbf" + lines(TEXTS).rstrip(b"\n")),
    "a.jsonl.gz": lambda p: p.write_bytes(gzip.compress(lines(TEXTS))),
    "a.jsonl.zst": lambda p: p.write_bytes(two_frames(lines(TEXTS))),
    "blank lines.jsonl": lambda p: p.write_bytes(b"\n" + lines(TEXTS).replace(b"\n", b"\r\n  \n")),
    "a.parquet": lambda p: pq.write_table(pa.table({"n": range(4), "text": TEXTS}), p, row_group_size=3),
    "large.parquet": lambda p: pq.write_table(pa.table({"text": pa.array(TEXTS, pa.large_string())}), p),
    "folder": lambda p: write_folder(p, TEXTS),
    "dataset": lambda p: write_dataset(p, TEXTS),
    "datasets": lambda p: write_datasets(p, TEXTS),
}


@pytest.mark.parametrize("name", FORMS)
def test_every_form_gives_the_same_texts(tmp_path, name):
    FORMS[name](tmp_path / name)
    assert read(tmp_path / name)[0] == TEXTS


HOSTILE_NAMES = ["-rf", "$(id)", "a b", "new\nline", "[x]*?", "\u202eevil", "'quote\"", "x" * 200, "\u00e9\u0301", "~"]


@pytest.mark.parametrize("name", HOSTILE_NAMES)
def test_hostile_names_are_only_names(tmp_path, name):
    (tmp_path / name).mkdir()
    (tmp_path / name / f"{name}.jsonl").write_bytes(lines(TEXTS))
    assert read(tmp_path / name)[0] == TEXTS
    assert read(tmp_path / name / f"{name}.jsonl")[0] == TEXTS


def test_globs_and_lists_name_each_file_once(tmp_path):
    for name in ("b.jsonl", "a.jsonl", "c.txt"):
        (tmp_path / name).write_bytes(lines(TEXTS))
    paths = find_files("law", [str(tmp_path / "c.txt"), str(tmp_path / "*.jsonl"), str(tmp_path)])
    assert [path.name for path in paths] == ["c.txt", "a.jsonl", "b.jsonl"]
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "d.txt").write_text("x")
    assert [path.name for path in find_files("law", [str(tmp_path / "**" / "*.txt")])] == ["c.txt", "d.txt"]


@pytest.mark.parametrize("pattern", ["none.jsonl", "*.zip", "void", "a.pkl", "", "nul\0"])
def test_a_path_without_text_is_an_error_that_names_it(tmp_path, pattern):
    (tmp_path / "void").mkdir()
    (tmp_path / "void" / "a.pt").write_bytes(b"x")
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(TEXTS))
    given = f"{tmp_path}/{pattern}" if pattern and "\0" not in pattern else pattern
    with pytest.raises(DataError, match="domain law") as caught:
        find_files("law", [given])
    assert (pattern.strip("\0") in str(caught.value)) or not pattern


GOOD = lines(["good"])
FAULTS = {
    "bad_json": ("a.jsonl", GOOD + b'{"text": "cut\n' + GOOD, "a.jsonl:2: not valid JSON"),
    "bad_json (list)": ("a.json", b"[\n]\n" + GOOD, "write one object per line"),
    "bad_json (number)": ("a.jsonl", GOOD + b"3\n", "a.jsonl:2: a JSON object is needed, got int"),
    "bad_json (deep)": ("a.jsonl", GOOD + b"[" * 100_000 + b"\n", "a.jsonl:2: not valid JSON"),
    "missing_field": ("a.jsonl", GOOD + b'{"content": "x", "id": 1}\n', "no field 'text'; it has 'content', 'id'"),
    "not_text": ("a.jsonl", GOOD + b'{"text": 5}\n', "a.jsonl:2: text must be a string, got int"),
    "not_text (null)": ("a.jsonl", GOOD + b'{"text": null}\n', "got NoneType"),
    "bad_encoding": ("a.jsonl", GOOD + b'{"text": "caf\xe9"}\n', "a.jsonl:2: not UTF-8 at byte 13"),
    "bad_encoding (surrogate)": ("a.jsonl", GOOD + b'{"text": "\\ud800"}\n', "a.jsonl:2: the text is not UTF-8"),
    "binary": ("a.jsonl", GOOD + b'{"text": "a\\u0000b"}\n', "a.jsonl:2: the text holds NUL"),
    "binary (UTF-16)": ("a.txt", "text\u00e9".encode("utf-16"), "a.txt:1: not UTF-8, and holds NUL bytes"),
    "bad_encoding (file)": ("a.txt", b"line\nline\ncaf\xe9", "a.txt:3: not UTF-8 at byte 13"),
    "empty": ("a.jsonl", GOOD + b'{"text": " \\n"}\n', "a.jsonl:2: the text is empty"),
    "empty_file": ("a.jsonl", b"", "a.jsonl: the file is empty"),
    "unreadable (gzip)": ("a.jsonl.gz", gzip.compress(GOOD * 2000)[:-30], "cannot be read to its end"),
    "unreadable (not gzip)": ("a.jsonl.gz", b"plain text", "cannot be read to its end"),
    "unreadable (zstd)": ("a.jsonl.zst", zstandard.compress(GOOD * 2000)[:-9], "the compressed file ends early"),
    "unreadable (not zstd)": ("a.jsonl.zst", b"plain text", "cannot be read to its end"),
    "unreadable (parquet)": ("a.parquet", b"PAR1 and then nothing", "not a whole parquet file"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_faults_stop_with_file_and_line_or_are_counted(tmp_path, name):
    """Broken input: with stop one error that names the place, with skip a count by kind and the rest of the text."""
    file_name, content, message = FAULTS[name]
    (tmp_path / file_name).write_bytes(content)
    (tmp_path / "z.jsonl").write_bytes(lines(["last"]))
    with pytest.raises(DataError, match="domain law") as caught:
        read(tmp_path)
    assert message in str(caught.value)
    assert "data.on_error=skip" in str(caught.value)
    texts, faults = read(tmp_path, OnError.skip)
    kind = name.split(" ")[0]
    assert faults.counts[kind] >= 1
    assert set(faults.counts) == {kind}
    assert message in faults.summary
    assert texts[-1] == "last"
    assert set(texts) <= {"good", "last"}
    if not kind.startswith(("unreadable", "empty_file")) and file_name != "a.txt":
        assert texts[0] == "good"


def test_columns_without_text_are_named(tmp_path):
    pq.write_table(pa.table({"body": ["x"], "text": [1]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="column 'text' holds int64, not strings"):
        read(tmp_path / "a.parquet")
    with pytest.raises(DataError, match="no column 'content'; it has 'body', 'text'"):
        read(tmp_path / "a.parquet", text_field="content")
    assert read(tmp_path / "a.parquet", text_field="body")[0] == ["x"]
    write_dataset(tmp_path / "set", ["x"])
    with pytest.raises(DataError, match="no column 'content'"):
        read(tmp_path / "set", text_field="content")


def test_strings_of_a_column_need_not_be_utf8(tmp_path):
    column = pa.array([b"good", b"caf\xe9", None], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
    texts, faults = read(tmp_path / "a.parquet", OnError.skip)
    assert texts == ["good"]
    assert dict(faults.counts) == {"bad_encoding": 1, "not_text": 1}


def test_a_document_may_be_too_long(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "MAX_DOCUMENT_BYTES", 100)
    (tmp_path / "a.jsonl").write_bytes(GOOD + lines(["x" * 1000]) + GOOD)
    (tmp_path / "b.txt").write_text("x" * 101)
    texts, faults = read(tmp_path, OnError.skip)
    assert texts == ["good", "good"]
    assert dict(faults.counts) == {"too_large": 2}


@pytest.mark.parametrize("name", ["../secret.arrow", "/etc/passwd", "a/../../b", "..", ""])
def test_a_dataset_cannot_name_files_elsewhere(tmp_path, name):
    """R12: no file outside of the dataset is read."""
    write_dataset(tmp_path / "set", TEXTS)
    os.rename(tmp_path / "set" / "data-00000-of-00001.arrow", tmp_path / "secret.arrow")
    state = json.loads((tmp_path / "set" / "state.json").read_text())
    state["_data_files"] = [{"filename": name}]
    (tmp_path / "set" / "state.json").write_text(json.dumps(state))
    with pytest.raises(DataError, match="cannot be read"):
        read(tmp_path / "set")


def test_a_pickle_is_never_loaded(tmp_path):
    """R12: a pickle under any accepted name is text or an error, never code that runs."""

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    for name in ("a.jsonl", "b.parquet", "c.txt", "d.jsonl.zst"):
        (tmp_path / name).write_bytes(pickle.dumps(Evil()))
    texts, faults = read(tmp_path, OnError.skip)
    assert texts == []
    assert sum(faults.counts.values()) >= 4
    assert not (tmp_path / "ran").exists()
