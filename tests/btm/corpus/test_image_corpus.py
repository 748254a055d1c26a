import hashlib
import json
import shutil

import numpy as np
import pytest
from rich.console import Console

from btm.corpus.images.decoder import MixedDecoder
from btm.corpus.images.image_tokenizer import ImageTokenizer
from btm.corpus.images.pictures import load_picture, save_png
from btm.corpus.images.vocabulary import MixedVocabulary, load_image_tokenizer
from btm.corpus.progress import ProgressLine
from btm.corpus.shards import TokenShard
from btm.corpus.tokenizer import TextEncoder
from btm.corpus.worker import prepare
from btm.errors import DataError
from btm.requests import PrepareSpec

SPLITS = ("train", "dev", "test")


def spec_of(root, domains, *, tokenizer=None, **data):
    given = {"domains": domains, "images": ["pictures"], "dev_fraction": 0.1, "test_fraction": 0.1}
    sizes = {"vocab_size": 300, "train_bytes": 50_000, "image_size": 16, "image_codes": 32}
    return PrepareSpec(
        root=str(root),
        output_dir=str(root / "corpus"),
        tokenizer_dir=str(root / "tokenizer"),
        data=given | {"min_train_tokens": 100} | data,
        tokenizer=sizes | (tokenizer or {}),
    )


def tree(directory):
    return {
        str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def rows_of(folder):
    return [json.loads(line) for line in (folder / "captions.jsonl").read_text().splitlines()]


def write_text(path):
    texts = [f"text number {number} says {number * 7} and nothing of pictures" for number in range(200)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory, picture_folder):
    root = tmp_path_factory.mktemp("prepared")
    text = write_text(root / "text.jsonl")
    return root, prepare(spec_of(root, {"text": text, "pictures": str(picture_folder)}))


def documents_of(root, domain="pictures"):
    """Split -> decoded documents: text, and the pictures as bytes."""
    decoder, found = MixedDecoder(root / "tokenizer"), {}
    for split in SPLITS:
        shard = TokenShard(root / "corpus" / domain / split)
        parts = [decoder.decode(shard.document(index)) for index in range(shard.num_documents)]
        found[split] = [
            [part if isinstance(part, str) else part.pixels.tobytes() for part in document] for document in parts
        ]
    return found


def test_shards_hold_every_caption_with_its_picture(prepared, picture_folder):
    root, result = prepared
    tokenizer = load_image_tokenizer(root / "tokenizer")
    expected = []
    for row in rows_of(picture_folder):
        picture = tokenizer.decode(tokenizer.encode(load_picture(picture_folder / row["image"]))).tobytes()
        captions = row["captions"]
        texts = (captions["en"]["name"], captions["en"]["keywords"], captions["de"]["name"])
        expected += [(text, picture) for text in texts]
    found = [document for documents in documents_of(root).values() for document in documents]
    as_pairs = [tuple(sorted(document, key=lambda part: isinstance(part, bytes))) for document in found]
    assert sorted(as_pairs) == sorted(expected)
    orders = [isinstance(document[0], bytes) for document in found]
    assert 0.3 < np.mean(orders) < 0.7
    sizes = result.domains["pictures"].splits
    assert sum(size.documents for size in sizes.values()) == len(expected)
    assert sum(size.bytes for size in sizes.values()) == sum(len(text.encode()) + 768 for text, _ in expected)


def test_captions_of_a_picture_are_in_one_split(prepared):
    documents = documents_of(prepared[0])
    numbers = {
        split: {part.split()[-1] for document in found for part in document if isinstance(part, str)}
        for split, found in documents.items()
    }
    assert all(len(found) > 3 for found in numbers.values())
    assert not numbers["train"] & (numbers["dev"] | numbers["test"])
    assert not numbers["dev"] & numbers["test"]


def test_one_vocabulary_for_both_domains(prepared):
    root, result = prepared
    vocabulary = MixedVocabulary.load(root / "tokenizer")
    assert result.vocab_size == vocabulary.size == TextEncoder(root / "tokenizer").vocab_size
    assert TokenShard(root / "corpus" / "text" / "train").tokens.max() < vocabulary.begin_id
    report = load_image_tokenizer(root / "tokenizer").report
    assert set(report["psnr_db"]) == {"train", "held-out"}
    assert report["psnr_db"]["train"] > report["psnr_db"]["held-out"] > 10


def test_used_again_and_the_same_anew(tmp_path, prepared, picture_folder):
    root, result = prepared
    domains = {"text": str(root / "text.jsonl"), "pictures": str(picture_folder)}
    before = tree(root)
    stamps = {path: path.stat().st_mtime_ns for path in (root / "corpus" / "pictures").iterdir()}
    assert prepare(spec_of(root, domains)) == result
    assert tree(root) == before
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps
    anew = prepare(spec_of(tmp_path, domains, num_workers=1))
    assert anew.domains["pictures"].fingerprint == result.domains["pictures"].fingerprint
    assert tree(tmp_path / "tokenizer") == tree(root / "tokenizer")


@pytest.mark.parametrize("stage", ["train_image_tokenizer", "combine", "save_shown"])
def test_a_killed_preparation_goes_on(tmp_path, prepared, picture_folder, monkeypatch, stage):
    root, result = prepared
    domains = {"text": str(root / "text.jsonl"), "pictures": str(picture_folder)}

    def stop(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(f"btm.corpus.images.corpus.{stage}", stop)
        with pytest.raises(KeyboardInterrupt):
            prepare(spec_of(tmp_path, domains))
    assert not (tmp_path / "corpus" / "pictures").exists()
    again = prepare(spec_of(tmp_path, domains))
    assert again.domains == result.domains
    assert tree(tmp_path / "tokenizer") == tree(root / "tokenizer")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus", "tokenizer"]


@pytest.fixture
def own(tmp_path, picture_folder):
    """A copy of the pictures that a test may change."""
    shutil.copytree(picture_folder, tmp_path / "own")
    return tmp_path / "own"


def prepare_saying(spec, path):
    with open(path, "w") as file, ProgressLine(Console(file=file, width=1000)) as line:
        result = prepare(spec, line)
    return result, path.read_text()


def test_a_changed_picture_prepares_the_domain_again(tmp_path, own, photographs):
    spec = spec_of(tmp_path / "forest", {"pictures": str(own)})
    before = prepare(spec)
    save_png(photographs[-1], own / "000.png")
    after, said = prepare_saying(spec, tmp_path / "said")
    assert "domain pictures is prepared again: a picture of domain pictures has changed" in said
    assert after.domains["pictures"].fingerprint != before.domains["pictures"].fingerprint


def test_other_captions_prepare_the_domain_again(tmp_path, own):
    before = prepare(spec_of(tmp_path / "forest", {"pictures": str(own)}))
    after, said = prepare_saying(
        spec_of(tmp_path / "forest", {"pictures": str(own)}, caption_keys=["de"]), tmp_path / "said"
    )
    assert "the choice of captions ['de'] is new" in said
    count = [sum(split.documents for split in info.domains["pictures"].splits.values()) for info in (before, after)]
    assert count == [480, 160]


def test_damage_is_noticed(tmp_path, own):
    spec = spec_of(tmp_path / "forest", {"pictures": str(own)})
    before = prepare(spec)
    (tmp_path / "forest" / "corpus" / "pictures" / "pictures.npy").unlink()
    after, said = prepare_saying(spec, tmp_path / "said")
    assert "its files are damaged" in said
    assert after == before


def test_broken_pictures_are_reported_with_file_and_count(tmp_path, own):
    (own / "005.png").write_bytes((own / "005.png").read_bytes()[:60])
    (own / "011.png").unlink()
    with pytest.raises(DataError, match=r"captions\.jsonl:6: .*005\.png is no picture"):
        prepare(spec_of(tmp_path / "stops", {"pictures": str(own)}))
    result = prepare(spec_of(tmp_path / "skips", {"pictures": str(own)}, on_error="skip"))
    assert result.domains["pictures"].broken == {"bad_image": 2}
    assert any("left out 2 documents (2 bad_image)" in warning for warning in result.warnings)
    assert sum(split.documents for split in result.domains["pictures"].splits.values()) == 3 * 158


def test_pictures_shared_by_two_domains(tmp_path, own, picture_folder, photographs):
    """A novel domain is all held out, so the pictures that the other trains on are dropped from it."""
    for number in range(160, 220):
        save_png(photographs[number], own / f"{number:03}.png")
    rows = [{"image": f"{number:03}.png", "caption": f"once more {number}"} for number in range(220)]
    (own / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    spec = spec_of(
        tmp_path / "forest", {"pictures": str(picture_folder)}, novel={"again": str(own)}, images=["pictures", "again"]
    )
    result = prepare(spec)
    train, again = documents_of(tmp_path / "forest")["train"], documents_of(tmp_path / "forest", "again")
    trained = {part.split()[-1] for document in train for part in document if isinstance(part, str)}
    kept = {
        part.split()[-1]
        for split in ("dev", "test")
        for document in again[split]
        for part in document[:2]
        if isinstance(part, str)
    }
    assert kept == {str(number) for number in range(220)} - trained
    assert result.domains["again"].near_duplicates == len(trained) > 100
    assert again["train"] == []


def test_a_later_domain_is_compared_with_pictures_on_disk(tmp_path, own, picture_folder):
    """As `btm add` prepares it: with other fractions, pictures of the first domain's training would be held out."""
    root = tmp_path / "forest"
    first = prepare(spec_of(root, {"pictures": str(picture_folder)}))
    rows = [{"image": row["image"], "caption": f"once more {row['image']}"} for row in rows_of(own)]
    (own / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    again = {"domains": {"again": str(own)}, "images": ["again"], "min_train_tokens": 1}
    same = prepare(spec_of(root, **again)).domains["again"]
    assert same.near_duplicates == 0
    assert [same.splits[split].documents * 3 for split in SPLITS] == [
        first.domains["pictures"].splits[split].documents for split in SPLITS
    ]
    other = prepare(spec_of(root, **again, dev_fraction=0.3)).domains["again"]
    assert other.near_duplicates > 10
    assert other.splits["train"].documents < same.splits["train"].documents
    assert other.splits["dev"].documents == same.splits["dev"].documents


def test_pictures_cannot_join_a_forest_of_text(tmp_path, prepared, picture_folder):
    domains = {"text": str(prepared[0] / "text.jsonl")}
    prepare(spec_of(tmp_path, domains, images=[]))
    with pytest.raises(DataError, match="begin a new forest with pictures among them"):
        prepare(spec_of(tmp_path, domains | {"pictures": str(picture_folder)}))


def test_a_tokenizer_with_pictures_is_taken_whole(tmp_path, prepared, picture_folder):
    root, result = prepared
    given = spec_of(tmp_path, {"pictures": str(picture_folder)}, tokenizer={"path": str(root / "tokenizer")})
    found = prepare(given)
    assert tree(tmp_path / "tokenizer") == tree(root / "tokenizer")
    assert found.domains["pictures"].splits == result.domains["pictures"].splits
    shutil.copytree(root / "tokenizer", tmp_path / "without")
    shutil.rmtree(tmp_path / "without" / "image_tokenizer")
    given = spec_of(tmp_path / "b", {"pictures": str(picture_folder)}, tokenizer={"path": str(tmp_path / "without")})
    with pytest.raises(DataError, match="holds no sound image tokenizer"):
        prepare(given)


def test_only_json_lines_hold_pictures(tmp_path, own):
    (own / "notes.txt").write_text("some notes")
    with pytest.raises(DataError, match=r"notes\.txt is not JSON lines"):
        prepare(spec_of(tmp_path / "forest", {"pictures": str(own)}))


def test_fewer_patches_than_codes(tmp_path):
    """Pictures of few patches give fewer codes, and come back exactly."""
    rows = []
    for number in range(120):
        bits = np.array([int(bit) for bit in f"{number:016b}"]).reshape(4, 4)
        picture = np.kron(bits, np.full((4, 4), 255)).astype(np.uint8)[..., None].repeat(3, axis=-1)
        save_png(picture, tmp_path / f"{number}.png")
        rows.append({"image": f"{number}.png", "caption": f"bits of {number}"})
    (tmp_path / "bits.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    prepare(spec_of(tmp_path / "forest", {"pictures": str(tmp_path / "bits.jsonl")}))
    found = ImageTokenizer.load(tmp_path / "forest" / "tokenizer" / "image_tokenizer")
    assert found.num_codes == 2
    pictures = {part for split in documents_of(tmp_path / "forest").values() for d in split for part in d}
    assert {load_picture(tmp_path / f"{number}.png").tobytes() for number in range(120)} <= pictures
