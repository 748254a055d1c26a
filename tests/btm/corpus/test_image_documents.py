import json
import os

import numpy as np
import pytest

from btm.config_data import OnError
from btm.corpus.faults import Faults
from btm.corpus.images.documents import captions_of, read_image_documents
from btm.corpus.images.index import PictureIndex
from btm.corpus.images.marks import mark, pictures_in, plain
from btm.corpus.images.pictures import load_picture, picture_hash, save_png
from btm.errors import DataError


@pytest.fixture
def folder(tmp_path, photographs):
    for index, name in enumerate("abc"):
        save_png(photographs[index], tmp_path / f"{name}.png")
    return tmp_path


def hashes(folder, names="abc"):
    return [picture_hash(load_picture(folder / f"{name}.png")) for name in names]


def read(folder, *rows, keys=(), on_error=OnError.stop, index=None):
    path = folder / "rows.jsonl"
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    faults = Faults("pictures", on_error)
    found = read_image_documents(
        [path], text_field="text", caption_keys=keys, index=index or PictureIndex(2), faults=faults
    )
    return list(found), faults


def test_every_caption_makes_a_document_with_its_picture(folder):
    captions = {"en": {"name": "a hat", "keywords": ["cap", "hat"]}, "de": "ein Hut"}
    documents, _ = read(folder, {"image": "a.png", "captions": captions}, {"image": "b.png", "caption": "a boat"})
    a, b = hashes(folder, "ab")
    assert [plain(document.text) for document in documents] == ["a hat", "cap", "hat", "ein Hut", "a boat"]
    assert [pictures_in(document.text) for document in documents] == [[a]] * 4 + [[b]]
    assert [document.line for document in documents] == [1, 1, 1, 1, 2]


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ((), ["a", "b", "c", "d"]),
        (("en",), ["a", "b"]),
        (("en", "name"), ["a"]),
        (("de", "en"), ["c", "d", "a", "b"]),
        (("fr",), ["a", "b", "c", "d"]),
        (("name",), ["a", "c"]),
    ],
)
def test_keys_choose_captions(keys, expected):
    captions = {"en": {"name": "a", "keywords": "b"}, "de": {"name": "c", "keywords": ["d", "c"]}}
    assert captions_of(captions, keys) == expected


def test_captions_stand_before_and_behind_by_hash(folder):
    rows = [{"image": "a.png", "captions": [f"caption number {number}" for number in range(200)]}]
    documents, _ = read(folder, *rows)
    (picture,) = hashes(folder, "a")
    first = [document.text.startswith(mark(picture)) for document in documents]
    last = [document.text.endswith(mark(picture)) for document in documents]
    assert last == [not is_first for is_first in first]
    assert 60 < sum(first) < 140
    again, _ = read(folder, *rows)
    assert [document.text for document in again] == [document.text for document in documents]


def test_interleaved_pictures_stand_where_the_text_says(folder):
    a, b, _ = hashes(folder)
    documents, _ = read(
        folder,
        {"text": "one <image> two <image>", "images": ["b.png", "a.png"]},
        {"text": "<image><image>", "images": ["a.png", "a.png"]},
        {"text": "no picture, <image> stays text"},
        {"text": "side by side", "images": ["a.png", "b.png"]},
        {"image": "b.png"},
    )
    texts = [document.text for document in documents]
    assert texts[:3] == [f"one {mark(b)} two {mark(a)}", mark(a) * 2, "no picture, <image> stays text"]
    assert texts[3] in (f"side by side{mark(a)}{mark(b)}", f"{mark(a)}{mark(b)}side by side")
    assert texts[4] == mark(b)


def test_bytes_are_those_of_text_and_pixels(folder):
    index = PictureIndex(1, bytes_per_picture=1000)
    rows = ({"text": "zwölf <image>", "images": ["a.png"]}, {"text": "zwölf"}, {"images": ["a.png", "b.png"]})
    assert [document.num_bytes for document in read(folder, *rows, index=index)[0]] == [7 + 1000, 6, 2000]


FAULTS = [
    ({"image": "missing.png", "captions": "x"}, "bad_image", "No such file"),
    ({"image": "rows.jsonl", "captions": "x"}, "bad_image", "is no picture that can be read"),
    ({"text": "x <image> y <image>", "images": ["a.png"]}, "missing_field", "has 2 <image> places for 1 pictures"),
    ({"image": "a.png", "captions": 7}, "not_text", "a caption must be a string, got int"),
    ({"image": "a.png", "captions": {"en": [None]}}, "not_text", "got NoneType"),
    ({"image": "a.png", "captions": [" ", ""]}, "empty", "no caption that is not empty"),
    ({"captions": "a hat"}, "empty", "captions without a picture"),
    ({"images": "a.png\0", "text": "x"}, "not_text", "paths of pictures"),
    ({"images": [7], "text": "x"}, "not_text", "paths of pictures"),
    ({"images": {"a": 1}, "text": "x"}, "not_text", "paths of pictures"),
    ({"text": 5, "images": ["a.png"]}, "not_text", "must be a string, got int"),
    ({"text": " ", "images": []}, "empty", "the text is empty"),
    ({"other": 1}, "missing_field", "no field 'text' and no pictures"),
    ({"text": "a\ufdd0b"}, "not_text", "U\\+FDD0"),
    ({"text": "a\0b"}, "binary", "NUL"),
    ('{"text": "\\ud800", "images": ["a.png"]}', "bad_encoding", "not UTF-8"),
    ("[1]", "bad_json", "a JSON object is needed"),
    ("{", "bad_json", "not valid JSON"),
]


@pytest.mark.parametrize(("row", "kind", "words"), FAULTS)
def test_broken_rows_stop_or_are_counted(folder, row, kind, words):
    good = {"image": "a.png", "captions": "a hat"}
    with pytest.raises(DataError, match=rf"rows\.jsonl:2: .*{words}.*data\.on_error=skip"):
        read(folder, good, row)
    documents, faults = read(folder, good, row, good | {"image": "b.png"}, on_error=OnError.skip)
    assert [document.line for document in documents] == [1, 3]
    assert dict(faults.counts) == {kind: 1}
    assert "rows.jsonl:2" in faults.summary


def test_a_changed_picture_is_read_again(folder, photographs):
    index = PictureIndex(1)
    first = index.look_up([folder / "a.png"])
    save_png(photographs[7], folder / "a.png")
    os.utime(folder / "a.png", ns=(1, 1))
    second = index.look_up([folder / "a.png"])
    assert second == {folder / "a.png": picture_hash(photographs[7])} != first


def test_pictures_of_known_hashes(folder, photographs):
    index = PictureIndex(2)
    found = index.look_up([folder / f"{name}.png" for name in "abcab"])
    wanted = [found[folder / f"{name}.png"] for name in "cba"]
    np.testing.assert_array_equal(np.concatenate(list(index.pictures(wanted, 16))), photographs[[2, 1, 0]])
    save_png(photographs[9], folder / "b.png")
    with pytest.raises(DataError, match=r"b\.png changed while its domain was being prepared"):
        list(index.pictures(wanted, 16))
