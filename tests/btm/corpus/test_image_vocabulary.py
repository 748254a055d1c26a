import json
import shutil

import numpy as np
import pytest
from transformers import AutoTokenizer

from btm.corpus.images.decoder import DecodedPicture, MixedDecoder
from btm.corpus.images.encoder import MixedEncoder
from btm.corpus.images.image_tokenizer import train_image_tokenizer
from btm.corpus.images.marks import mark, pictures_in, pieces, plain
from btm.corpus.images.pictures import load_picture
from btm.corpus.images.vocabulary import (
    IMAGE,
    MODALITIES,
    TEXT,
    MixedVocabulary,
    combine,
    load_image_tokenizer,
    loss_by_modality,
    modality_of,
    modality_starts,
    modality_table,
)
from btm.corpus.tokenizer import TextEncoder, load_tokenizer, tokenizer_sha256, train_tokenizer
from btm.errors import DataError

TEXTS = [f"a bright piece of picture {number}, or a dark one\n" for number in range(200)]
HASHES = ["0" * 31 + "a", "f" * 32]
CODES = 24


@pytest.fixture(scope="module")
def image_tokenizer(photographs):
    return train_image_tokenizer([photographs[:100]], size=16, patch=4, num_codes=CODES)


@pytest.fixture(scope="module")
def text_dir(tmp_path_factory):
    directory = tmp_path_factory.mktemp("text") / "tokenizer"
    train_tokenizer(TEXTS, directory, vocab_size=300)
    return directory


@pytest.fixture(scope="module")
def combined(tmp_path_factory, text_dir, image_tokenizer):
    directory = tmp_path_factory.mktemp("combined") / "tokenizer"
    combine(text_dir, image_tokenizer, directory)
    return directory


@pytest.fixture(scope="module")
def encoder(combined, image_tokenizer, photographs):
    codes = image_tokenizer.encode(photographs[[0, 1]])
    return MixedEncoder(combined, MixedVocabulary.load(combined), dict(zip(HASHES, codes, strict=True)))


def test_text_then_delimiters_then_codes(combined, text_dir):
    vocabulary, text_size = MixedVocabulary.load(combined), TextEncoder(text_dir).vocab_size
    assert (vocabulary.begin_id, vocabulary.end_id, vocabulary.first_code) == (
        text_size,
        text_size + 1,
        text_size + 2,
    )
    assert vocabulary.num_codes == CODES
    assert vocabulary.size == TextEncoder(combined).vocab_size == text_size + 2 + CODES
    assert MixedVocabulary.load(text_dir) is None


def test_text_keeps_its_ids(combined, text_dir):
    for one, other in zip(TextEncoder(combined).encode(TEXTS), TextEncoder(text_dir).encode(TEXTS), strict=True):
        np.testing.assert_array_equal(one, other)


def test_transformers_loads_it(combined):
    vocabulary = MixedVocabulary.load(combined)
    for tokenizer in (load_tokenizer(combined), AutoTokenizer.from_pretrained(str(combined), local_files_only=True)):
        assert len(tokenizer) == vocabulary.size
        assert tokenizer.encode("a<image>", add_special_tokens=False)[-1] == vocabulary.begin_id
        ids = [*tokenizer.encode("a piece", add_special_tokens=False), *vocabulary.image_ids(np.arange(CODES))]
        assert tokenizer.decode(ids, skip_special_tokens=True) == "a piece"


def test_modality_of_every_id(combined, text_dir):
    table, vocabulary = modality_table(combined), MixedVocabulary.load(combined)
    named = load_tokenizer(combined).convert_ids_to_tokens(list(range(len(table))))
    assert table.tolist() == [IMAGE if name.startswith("<image:") else TEXT for name in named]
    assert len(table) == vocabulary.size
    assert np.bincount(table).tolist() == [vocabulary.first_code, CODES]
    assert MODALITIES[IMAGE] == "image"
    assert np.searchsorted(modality_starts(combined), np.arange(len(table)), side="right").tolist() == table.tolist()
    assert modality_starts(text_dir) == ()
    padded = modality_table(combined, vocabulary.size + 5)
    assert padded.tolist() == [*table.tolist(), *[TEXT] * 5]
    assert modality_table(text_dir).tolist() == [TEXT] * 300
    with pytest.raises(DataError, match="shorter than the vocabulary"):
        modality_table(combined, 300)
    with pytest.raises(DataError, match="shorter than the vocabulary"):
        modality_table(text_dir, 299)
    ids = np.array([[0, vocabulary.first_code], [vocabulary.begin_id, vocabulary.size - 1]])
    assert modality_of(ids, table).tolist() == [[TEXT, IMAGE], [TEXT, IMAGE]]
    with pytest.raises(DataError, match="must lie in"):
        modality_of(np.array([vocabulary.size]), table)


def test_loss_by_modality_of_the_predicted_token(combined):
    table, first = modality_table(combined), MixedVocabulary.load(combined).first_code
    ids, logp = np.array([[0, first], [first + 1, 1]]), np.array([[-1.0, -2.0], [-4.0, -5.0]], dtype=np.float32)
    assert loss_by_modality(logp, ids, table) == {"text": 3.0, "image": 3.0}
    assert loss_by_modality(logp[:, :1], ids[:, :1], table) == {"text": 1.0, "image": 4.0}
    assert loss_by_modality(logp[:1, :1], ids[:1, :1], table) == {"text": 1.0}
    with pytest.raises(DataError, match="as many as tokens"):
        loss_by_modality(logp[0], ids, table)


def test_another_codebook_is_another_tokenizer(tmp_path, text_dir, combined, photographs):
    other = train_image_tokenizer([photographs[100:200]], size=16, patch=4, num_codes=CODES)
    combine(text_dir, other, tmp_path / "other")
    assert tokenizer_sha256(tmp_path / "other") != tokenizer_sha256(combined)
    combine(text_dir, load_image_tokenizer(combined), tmp_path / "same")
    assert tokenizer_sha256(tmp_path / "same") == tokenizer_sha256(combined)


def test_marks_come_apart_as_they_were_joined():
    text = "one " + mark(HASHES[0]) + mark(HASHES[1]) + " two"
    assert list(pieces(text)) == [("text", "one "), ("image", HASHES[0]), ("image", HASHES[1]), ("text", " two")]
    assert pictures_in(text) == HASHES
    assert plain(text) == "one  two"


def test_documents_are_their_parts_one_after_the_other(combined, encoder, image_tokenizer, photographs):
    vocabulary, text = MixedVocabulary.load(combined), TextEncoder(combined)
    one, two = mark(HASHES[0]), mark(HASHES[1])
    pictures = [vocabulary.image_ids(image_tokenizer.encode(photographs[index])) for index in (0, 1)]
    before, behind = (text.encode([part])[0][:-1] for part in ("a dark", " one"))
    documents = encoder.encode([f"a dark{one} one{two}", two, "a dark", f"{one}{one}"])
    eos = [text.eos_id]
    expected = [[before, pictures[0], behind, pictures[1]], [pictures[1]], [before], [pictures[0], pictures[0]]]
    for found, parts in zip(documents, expected, strict=True):
        assert found.tolist() == np.concatenate([*parts, eos]).tolist()


def test_text_that_spells_image_tokens_stays_text(combined, encoder):
    vocabulary = MixedVocabulary.load(combined)
    spelled = f"<image> </image> <image:{vocabulary.fingerprint}:3>"
    ids = encoder.encode([spelled])[0][:-1]
    assert ids.max() < vocabulary.begin_id
    assert MixedDecoder(combined).decode(ids) == [spelled]


def test_decoded_in_order(combined, encoder, image_tokenizer, photographs):
    document = f"one {mark(HASHES[0])} and {mark(HASHES[1])}{mark(HASHES[0])}"
    found = MixedDecoder(combined).decode(encoder.encode([document])[0])
    assert [part if isinstance(part, str) else None for part in found] == ["one ", None, " and ", None, None]
    pictures = [part for part in found if isinstance(part, DecodedPicture)]
    for picture, index in zip(pictures, (0, 1, 0), strict=True):
        expected = image_tokenizer.decode(image_tokenizer.encode(photographs[index]))
        np.testing.assert_array_equal(picture.pixels, expected)
        assert picture.is_complete


def test_pictures_that_end_early_or_never(combined, image_tokenizer, photographs):
    decoder = MixedDecoder(combined)
    vocabulary, codes = decoder.vocabulary, image_tokenizer.encode(photographs[2])
    ids = codes + vocabulary.first_code
    cut = decoder.images_of([vocabulary.begin_id, *ids[:5]])
    assert [(picture.num_codes, picture.is_complete) for picture in cut] == [(5, False)]
    whole = image_tokenizer.decode(codes)
    np.testing.assert_array_equal(cut[0].pixels[:4], whole[:4])
    np.testing.assert_array_equal(cut[0].pixels[4:8, :4], whole[4:8, :4])
    rest = image_tokenizer.decode(image_tokenizer.encode(np.full((16, 16, 3), 255, dtype=np.uint8)))
    np.testing.assert_array_equal(cut[0].pixels[8:], rest[8:])
    endless = decoder.images_of([*ids, *ids, *ids[:1]])
    assert [picture.num_codes for picture in endless] == [16, 16, 1]
    np.testing.assert_array_equal(endless[1].pixels, whole)
    assert decoder.images_of([vocabulary.begin_id, vocabulary.end_id, 0]) == []
    assert decoder.decode([]) == []
    with pytest.raises(DataError, match="must be one sequence"):
        decoder.decode([vocabulary.size])


def test_saved_as_png(tmp_path, combined, encoder):
    decoder = MixedDecoder(combined)
    ids = encoder.encode([f"one {mark(HASHES[0])} two {mark(HASHES[1])}"])[0]
    paths = decoder.save_images(ids, tmp_path / "made", "drawn")
    assert [path.name for path in paths] == ["drawn-1.png", "drawn-2.png"]
    for path, picture in zip(paths, decoder.images_of(ids), strict=True):
        np.testing.assert_array_equal(load_picture(path), picture.pixels)
    assert decoder.save_images(encoder.encode(["text"])[0], tmp_path / "none") == []
    assert not (tmp_path / "none").exists()


def test_a_tokenizer_that_has_codes_already(tmp_path, combined, image_tokenizer):
    with pytest.raises(DataError, match="already has a token '<image>'"):
        combine(combined, image_tokenizer, tmp_path / "twice")
    assert not (tmp_path / "twice").exists()


def test_a_text_tokenizer_has_no_pictures(text_dir):
    with pytest.raises(DataError, match=r"has no image codes; begin a new forest with domains in data\.images"):
        load_image_tokenizer(text_dir)


def test_an_image_tokenizer_of_another_forest(tmp_path, combined, photographs):
    shutil.copytree(combined, tmp_path / "mixed")
    train_image_tokenizer([photographs[100:200]], size=16, patch=4, num_codes=CODES).save(
        tmp_path / "mixed" / "image_tokenizer"
    )
    with pytest.raises(DataError, match="its token names say"):
        load_image_tokenizer(tmp_path / "mixed")


def test_codes_that_are_not_whole(tmp_path, combined):
    shutil.copytree(combined, tmp_path / "broken")
    path = tmp_path / "broken" / "tokenizer.json"
    content = json.loads(path.read_text())
    content["added_tokens"] = [entry for entry in content["added_tokens"] if not entry["content"].endswith(":7>")]
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match="image codes that are not whole"):
        MixedVocabulary.load(tmp_path / "broken")
