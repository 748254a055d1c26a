"""Rows of JSON lines to documents with pictures, as marked text (:mod:`btm.corpus.images.marks`)."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from btm.corpus.faults import FaultKind, Faults
from btm.corpus.images.index import PictureIndex
from btm.corpus.images.marks import has_reserved, mark, plain
from btm.corpus.images.vocabulary import BEGIN
from btm.corpus.randomness import hash_text
from btm.corpus.readers import Document, Row, read_rows
from btm.errors import DataError

_ROWS = 256


class RowError(Exception):
    """A row that is no document; ``kind`` and the words for the user."""

    def __init__(self, kind: FaultKind, problem: str) -> None:
        super().__init__(problem)
        self.kind = kind


def read_image_documents(
    files: Sequence[Path], *, text_field: str, caption_keys: Sequence[str], index: PictureIndex, faults: Faults
) -> Iterator[Document]:
    """Documents of JSON-lines ``files`` in order; see :mod:`btm.corpus.images` for their form.

    Args:
        files: JSON lines.
        text_field: Field that holds the text of interleaved documents.
        caption_keys: Keys of nested captions to keep; see :func:`captions_of`.
        index: Reads and hashes the pictures.
        faults: Counts broken rows, or raises at the first.

    Yields:
        Documents whose text holds marks in place of pictures.
    """
    batch: list[tuple[Row, list[Path]]] = []
    for row in read_rows(files, faults):
        try:
            batch.append((row, picture_paths(row)))
        except RowError as error:
            faults.add(error.kind, row.path, row.line, str(error))
        if len(batch) >= _ROWS:
            yield from _documents(batch, text_field, caption_keys, index, faults)
            batch = []
    yield from _documents(batch, text_field, caption_keys, index, faults)


def picture_paths(row: Row) -> list[Path]:
    """Paths of a row's pictures, in order; relative ones start at the folder of its file.

    Raises:
        RowError: If ``images`` or ``image`` is neither a path nor a list of paths.
    """
    given = row.content.get("images", row.content.get("image"))
    names = [] if given is None else [given] if isinstance(given, str) else given
    if not isinstance(names, list) or not all(isinstance(name, str) and name and "\0" not in name for name in names):
        raise RowError(FaultKind.not_text, f"images must be paths of pictures, got {given!r}")
    return [row.path.parent / name for name in names]


def captions_of(value: Any, keys: Sequence[str]) -> list[str]:
    """Every string in ``value``, however nested in lists and objects, each once.

    Args:
        value: A string, list or object.
        keys: Where an object has any of these keys, its others are left out; ``["en"]`` keeps English alone.
    """
    if isinstance(value, dict):
        inner = [value[key] for key in keys if key in value] or list(value.values())
        return list(dict.fromkeys(text for part in inner for text in captions_of(part, keys)))
    if isinstance(value, list):
        return list(dict.fromkeys(text for part in value for text in captions_of(part, keys)))
    if not isinstance(value, str):
        raise RowError(FaultKind.not_text, f"a caption must be a string, got {type(value).__name__}")
    return [value]


def _documents(
    batch: Sequence[tuple[Row, list[Path]]],
    text_field: str,
    caption_keys: Sequence[str],
    index: PictureIndex,
    faults: Faults,
) -> Iterator[Document]:
    found = index.look_up([path for _, paths in batch for path in paths])
    for row, paths in batch:
        try:
            hashes = [_hash_or_fault(found[path]) for path in paths]
            texts = list(_marked(row, hashes, text_field, caption_keys))
        except RowError as error:
            faults.add(error.kind, row.path, row.line, str(error))
            continue
        for text in texts:
            size = len(plain(text).encode()) + len(hashes) * index.bytes_per_picture
            yield Document(text, row.path, row.line, size)


def _hash_or_fault(found: str | DataError) -> str:
    if isinstance(found, DataError):
        raise RowError(FaultKind.bad_image, str(found))
    return found


def _marked(row: Row, hashes: list[str], text_field: str, caption_keys: Sequence[str]) -> Iterator[str]:
    content, marks = row.content, "".join(map(mark, hashes))
    captions = content.get("captions", content.get("caption"))
    if captions is not None:
        texts = [text for text in captions_of(captions, caption_keys) if text.strip()]
        if not texts or not hashes:
            what = "captions without a picture" if texts else "no caption that is not empty"
            raise RowError(FaultKind.empty, f"the row has {what}")
        for text in texts:
            yield _in_some_order(_checked(text), hashes)
    elif text_field in content:
        yield _interleaved(_checked(content[text_field]), hashes)
    elif hashes:
        yield marks
    else:
        problem = f"no field {text_field!r} and no pictures; a row has text, images, or an image and captions"
        raise RowError(FaultKind.missing_field, f"{problem} (set data.text_field)")


def _interleaved(text: str, hashes: list[str]) -> str:
    parts = text.split(BEGIN)
    if not hashes:
        if not text.strip():
            raise RowError(FaultKind.empty, "the text is empty, and there is no picture")
        return text
    if len(parts) == 1:
        return _in_some_order(text, hashes)
    if len(parts) - 1 != len(hashes):
        problem = f"the text has {len(parts) - 1} {BEGIN} places for {len(hashes)} pictures"
        raise RowError(FaultKind.missing_field, f"{problem}; give each picture one, or none at all")
    return parts[0] + "".join(mark(found) + part for found, part in zip(hashes, parts[1:], strict=True))


def _in_some_order(text: str, hashes: list[str]) -> str:
    """The pictures before the text or behind it, by a hash of both."""
    marks = "".join(map(mark, hashes))
    return marks + text if hash_text("picture first", text, *hashes) % 2 else text + marks


def _checked(text: Any) -> str:
    if not isinstance(text, str):
        raise RowError(FaultKind.not_text, f"text must be a string, got {type(text).__name__}")
    if "\0" in text:
        raise RowError(FaultKind.binary, "the text holds NUL characters; is this a binary file?")
    if has_reserved(text):
        raise RowError(
            FaultKind.not_text, "the text holds U+FDD0 or U+FDD1, which stand for pictures here; remove them"
        )
    try:
        text.encode()
    except UnicodeError as error:
        raise RowError(FaultKind.bad_encoding, f"the text is not UTF-8 ({error})") from None
    return text
