"""Documents of a domain, one after the other, from any of the accepted forms; memory holds a batch at most.

Nothing here unpickles or runs anything that a file says. Broken documents go to :class:`btm.corpus.faults.Faults`.
"""

import json
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from btm.corpus.faults import FaultKind, Faults
from btm.corpus.files_of_domain import LINE_SUFFIXES, TEXT_SUFFIXES, file_kind, is_dataset
from btm.corpus.streams import open_bytes

if TYPE_CHECKING:
    import pyarrow as pa

MAX_DOCUMENT_BYTES = 1 << 28
"""Longest document, in bytes of its file."""
_ROWS = 256
_SHOWN_NAMES = 8


@dataclass(frozen=True, slots=True)
class Document:
    """One text and where it came from."""

    text: str
    path: Path
    line: int
    num_bytes: int | None = None
    """Bytes that it stands for where they are not those of its text; for bits per byte."""


@dataclass(frozen=True, slots=True)
class Row:
    """One object of a JSON-lines file."""

    content: dict[str, Any]
    path: Path
    line: int


def read_documents(files: Sequence[Path], *, text_field: str, faults: Faults) -> Iterator[Document]:
    """Documents of ``files`` in order.

    Args:
        files: Files and dataset directories; see :func:`btm.corpus.files_of_domain.find_files`.
        text_field: Field that holds the text.
        faults: Counts broken documents, or raises at the first.

    Yields:
        Documents with text that is not empty and can be written as UTF-8.
    """
    for path in files:
        try:
            yield from _read_file(path, text_field, faults)
        except (OSError, EOFError, zlib.error, json.JSONDecodeError, UnicodeDecodeError) as error:
            faults.add(FaultKind.unreadable, path, None, f"cannot be read to its end ({error})")


def read_rows(files: Sequence[Path], faults: Faults) -> Iterator[Row]:
    """Objects of JSON-lines ``files`` in order, whatever their fields.

    Args:
        files: JSON lines, plain or compressed.
        faults: Counts broken lines and files, or raises at the first.
    """
    for path in files:
        try:
            if path.stat().st_size == 0:
                faults.add(FaultKind.empty_file, path, None, "the file is empty")
            else:
                yield from _lines(path, faults)
        except (OSError, EOFError, zlib.error) as error:
            faults.add(FaultKind.unreadable, path, None, f"cannot be read to its end ({error})")


def _read_file(path: Path, text_field: str, faults: Faults) -> Iterator[Document]:
    kind = file_kind(path)
    if is_dataset(path):
        yield from _read_dataset(path, text_field, faults)
    elif path.stat().st_size == 0:
        faults.add(FaultKind.empty_file, path, None, "the file is empty")
    elif kind in LINE_SUFFIXES:
        yield from _read_lines(path, text_field, faults)
    elif kind in TEXT_SUFFIXES:
        yield from _read_text(path, faults)
    else:
        yield from _read_parquet(path, text_field, faults)


def _read_lines(path: Path, text_field: str, faults: Faults) -> Iterator[Document]:
    for row in _lines(path, faults):
        if text_field not in row.content:
            problem = f"no field {text_field!r}; it has {_names(row.content)} (set data.text_field)"
            faults.add(FaultKind.missing_field, path, row.line, problem)
        else:
            yield from _checked(row.content[text_field], path, row.line, faults)


def _lines(path: Path, faults: Faults) -> Iterator[Row]:
    with open_bytes(path) as file:
        number = 0
        while line := file.readline(MAX_DOCUMENT_BYTES):
            number += 1
            if len(line) == MAX_DOCUMENT_BYTES and not line.endswith(b"\n"):
                while (rest := file.readline(1 << 20)) and not rest.endswith(b"\n"):
                    pass
                faults.add(FaultKind.too_large, path, number, f"the line is longer than {MAX_DOCUMENT_BYTES} bytes")
            elif line.strip():
                yield from _from_line(line, path, number, faults)


def _from_line(line: bytes, path: Path, number: int, faults: Faults) -> Iterator[Row]:
    try:
        row = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
    except UnicodeDecodeError as error:
        kind, problem = _encoding_fault(line, error)
        faults.add(kind, path, number, problem)
        return
    except (ValueError, RecursionError) as error:
        hint = "; is this one JSON list? write one object per line" if line.lstrip().startswith(b"[") else ""
        faults.add(FaultKind.bad_json, path, number, f"not valid JSON ({error}){hint}")
        return
    if not isinstance(row, dict):
        hint = "; write one object per line" if isinstance(row, list) else ""
        faults.add(FaultKind.bad_json, path, number, f"a JSON object is needed, got {type(row).__name__}{hint}")
        return
    yield Row(row, path, number)


def _read_text(path: Path, faults: Faults) -> Iterator[Document]:
    with open_bytes(path) as file:
        data = file.read(MAX_DOCUMENT_BYTES + 1)
    if len(data) > MAX_DOCUMENT_BYTES:
        problem = f"a text file is one document and may have {MAX_DOCUMENT_BYTES} bytes; cut it into several files"
        faults.add(FaultKind.too_large, path, None, problem)
        return
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        kind, problem = _encoding_fault(data, error)
        faults.add(kind, path, data.count(b"\n", 0, error.start) + 1, problem)
        return
    yield from _checked(text, path, 1, faults)


def _read_parquet(path: Path, text_field: str, faults: Faults) -> Iterator[Document]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            if _has_text_column(file.schema_arrow, text_field, path, faults):
                batches = file.iter_batches(batch_size=_ROWS, columns=[text_field])
                yield from _from_batches(batches, text_field, path, faults)
    except pa.ArrowException as error:
        faults.add(FaultKind.unreadable, path, None, f"not a whole parquet file ({error})")


def _read_dataset(path: Path, text_field: str, faults: Faults) -> Iterator[Document]:
    """The Arrow files of ``datasets.save_to_disk``, named by its ``state.json``; every split of a dictionary."""
    if (path / "dataset_dict.json").is_file():
        for split in sorted(_entries(path / "dataset_dict.json", "splits")):
            yield from _read_dataset(path / split, text_field, faults)
        return
    for name in _entries(path / "state.json", "_data_files"):
        yield from _read_arrow(path / name, text_field, faults)


def _read_arrow(path: Path, text_field: str, faults: Faults) -> Iterator[Document]:
    import pyarrow as pa

    try:
        with pa.OSFile(str(path)) as source, pa.ipc.open_stream(source) as reader:
            if _has_text_column(reader.schema, text_field, path, faults):
                yield from _from_batches(reader, text_field, path, faults)
    except pa.ArrowException as error:
        faults.add(FaultKind.unreadable, path, None, f"not a whole Arrow file ({error})")


def _entries(path: Path, key: str) -> list[str]:
    """Names of files beside ``path`` that it lists; a name that leads elsewhere is refused."""
    content = json.loads(path.read_text(encoding="utf-8"))
    listed = content.get(key) if isinstance(content, dict) else None
    names: list[str] = []
    for entry in listed or []:
        name = entry.get("filename") if isinstance(entry, dict) else entry
        if not isinstance(name, str) or Path(name).name != name:
            raise OSError(f"{path} lists {name!r}, which is not the name of a file beside it")
        names.append(name)
    return names


def _has_text_column(schema: "pa.Schema", text_field: str, path: Path, faults: Faults) -> bool:
    import pyarrow as pa

    if text_field not in schema.names:
        problem = f"no column {text_field!r}; it has {_names(schema.names)} (set data.text_field)"
        faults.add(FaultKind.missing_field, path, None, problem)
        return False
    kind = schema.field(text_field).type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        faults.add(FaultKind.not_text, path, None, f"column {text_field!r} holds {kind}, not strings")
        return False
    return True


def _from_batches(
    batches: "Iterable[pa.RecordBatch]", text_field: str, path: Path, faults: Faults
) -> Iterator[Document]:
    number = 0
    for batch in batches:
        column = batch.column(batch.schema.get_field_index(text_field))
        column.validate(full=False)
        for start in range(0, len(column), _ROWS):
            # As bytes: the strings of a foreign file need not be UTF-8.
            for value in column.slice(start, _ROWS).cast("large_binary").to_pylist():
                number += 1
                yield from _checked(value, path, number, faults)


def _checked(value: Any, path: Path, number: int, faults: Faults) -> Iterator[Document]:
    try:
        text = value.decode("utf-8") if isinstance(value, bytes) else value
        if not isinstance(text, str):
            faults.add(FaultKind.not_text, path, number, f"text must be a string, got {type(value).__name__}")
        elif "\0" in text:
            faults.add(FaultKind.binary, path, number, "the text holds NUL characters; is this a binary file?")
        elif not text.strip():
            faults.add(FaultKind.empty, path, number, "the text is empty")
        else:
            text.encode("utf-8")
            yield Document(text, path, number)
    except UnicodeError as error:
        faults.add(FaultKind.bad_encoding, path, number, f"the text is not UTF-8 ({error})")


def _encoding_fault(data: bytes, error: UnicodeDecodeError) -> tuple[FaultKind, str]:
    if b"\0" in data:
        return FaultKind.binary, "not UTF-8, and holds NUL bytes; is this a binary or UTF-16 file?"
    return FaultKind.bad_encoding, f"not UTF-8 at byte {error.start} ({error.reason}); convert it to UTF-8"


def _names(names: Iterable[str]) -> str:
    shown = [repr(name) for name in sorted(names)]
    return ", ".join([*shown[:_SHOWN_NAMES], *(["..."] if len(shown) > _SHOWN_NAMES else [])]) or "none"
