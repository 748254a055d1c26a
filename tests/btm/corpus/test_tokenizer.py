import json

import numpy as np
import pytest

from btm.corpus.tokenizer import (
    EOS_TOKEN,
    TextEncoder,
    copy_tokenizer,
    load_tokenizer,
    tokenizer_sha256,
    train_tokenizer,
)
from btm.errors import DataError

TEXTS = [f"the number {number} is followed by {number + 1}, and so on\n" * 3 for number in range(300)]
HARD = [
    " leading",
    "\u65e5\u672c\u8a9e \u00e9\u00e8 \U0001f600",
    "a\r\n\tb  c",
    f"before {EOS_TOKEN} after",
    "\x01\x7f",
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tokenizer") / "trained"
    train_tokenizer(TEXTS, directory, vocab_size=400)
    return directory


def edit(source, target, name, change):
    copy_tokenizer(source, target)
    content = json.loads((target / name).read_text())
    change(content)
    (target / name).write_text(json.dumps(content))


@pytest.mark.parametrize("text", HARD)
def test_text_comes_back_and_never_ends_itself(trained, text):
    encoder = TextEncoder(trained)
    ids = encoder.encode([text])[0]
    assert ids[-1] == encoder.eos_id
    assert encoder.eos_id not in ids[:-1]
    assert load_tokenizer(trained).decode(ids[:-1]) == text


def test_transformers_loads_the_directory(trained):
    from transformers import AutoTokenizer

    found = AutoTokenizer.from_pretrained(str(trained), local_files_only=True)
    encoder = TextEncoder(trained)
    assert len(found) == encoder.vocab_size == 400
    assert found.eos_token == EOS_TOKEN
    assert found.eos_token_id == load_tokenizer(trained).eos_token_id == encoder.eos_id
    assert found(TEXTS[7])["input_ids"] == encoder.encode([TEXTS[7]])[0][:-1].tolist()
    assert {path.name for path in trained.iterdir()} == {
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
    }


def test_same_texts_same_tokenizer(trained, tmp_path):
    train_tokenizer(TEXTS, tmp_path / "again", vocab_size=400)
    assert (tmp_path / "again" / "tokenizer.json").read_bytes() == (trained / "tokenizer.json").read_bytes()
    train_tokenizer(TEXTS[:30], tmp_path / "other", vocab_size=400)
    assert tokenizer_sha256(tmp_path / "other") != tokenizer_sha256(trained)


def test_copy_from_a_model_directory(trained, tmp_path):
    model = tmp_path / "model"
    copy_tokenizer(trained, model)
    (model / "config.json").write_text('{"model_type": "llama"}')
    (model / "model.py").write_text("raise SystemExit")
    copy_tokenizer(model, tmp_path / "copy")
    assert sorted(path.name for path in (tmp_path / "copy").iterdir()) == sorted(p.name for p in trained.iterdir())
    assert tokenizer_sha256(tmp_path / "copy") == tokenizer_sha256(trained)


def test_hash_ignores_layout_and_padding(trained, tmp_path):
    edit(trained, tmp_path / "t", "tokenizer.json", lambda content: content.update(padding={"strategy": "x"}))
    assert tokenizer_sha256(tmp_path / "t") == tokenizer_sha256(trained)
    assert (tmp_path / "t" / "tokenizer.json").read_bytes() != (trained / "tokenizer.json").read_bytes()


def test_padding_and_truncation_of_the_file_are_ignored(trained, tmp_path):
    def shorten(content):
        content["truncation"] = {"max_length": 4, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}

    edit(trained, tmp_path / "t", "tokenizer.json", shorten)
    assert np.array_equal(TextEncoder(tmp_path / "t").encode(TEXTS[:1])[0], TextEncoder(trained).encode(TEXTS[:1])[0])


def test_converts_a_tokenizer_without_json(tmp_path):
    slow = tmp_path / "slow"
    slow.mkdir()
    (slow / "vocab.json").write_text(json.dumps({"a": 0, "b": 1, "ab": 2, EOS_TOKEN: 3}))
    (slow / "merges.txt").write_text("#version: 0.2\na b\n")
    (slow / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "GPT2Tokenizer", "eos_token": EOS_TOKEN})
    )
    copy_tokenizer(tmp_path / "slow", tmp_path / "fast")
    assert (tmp_path / "fast" / "tokenizer.json").is_file()
    assert TextEncoder(tmp_path / "fast").encode(["ab"])[0].tolist() == [2, 3]


def _set_code(directory):
    (directory / "evil.py").write_text("raise SystemExit")
    (directory / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": ["evil.Tok", null]}}')


BROKEN = {
    "code of its own": (_set_code, "code of its own"),
    "code in the model config": (
        lambda d: (d / "config.json").write_text('{"auto_map": {"AutoTokenizer": "x.y"}}'),
        "code of its own",
    ),
    "not JSON": (lambda d: (d / "tokenizer.json").write_text("{"), "not valid JSON"),
    "a list": (lambda d: (d / "tokenizer.json").write_text("[]"), "not a JSON object"),
    "something else": (lambda d: (d / "tokenizer.json").write_text("{}"), "is not a tokenizer"),
    "binary": (lambda d: (d / "tokenizer.json").write_bytes(b"\x80\x04K\x01."), "not valid JSON"),
    "no end-of-text token": (lambda d: (d / "tokenizer_config.json").write_text("{}"), "no end-of-text token"),
    "unknown end-of-text token": (
        lambda d: (d / "tokenizer_config.json").write_text('{"eos_token": "<end>"}'),
        "no end-of-text token",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_unfit_tokenizers_are_refused(trained, tmp_path, name):
    """R12: nothing that a tokenizer directory says is run, and nothing is written for one that is refused."""
    source = tmp_path / "source"
    copy_tokenizer(trained, source)
    (source / "special_tokens_map.json").unlink()
    damage, message = BROKEN[name]
    damage(source)
    with pytest.raises(DataError, match=message):
        copy_tokenizer(source, tmp_path / "copy")
    with pytest.raises(DataError, match=message):
        TextEncoder(source)
    assert not (tmp_path / "copy").exists()


def test_missing_tokenizers_are_named(tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        copy_tokenizer(tmp_path / "none", tmp_path / "copy")
    (tmp_path / "void").mkdir()
    with pytest.raises(DataError, match="no usable tokenizer"):
        copy_tokenizer(tmp_path / "void", tmp_path / "copy")
    with pytest.raises(DataError, match="does not exist"):
        tokenizer_sha256(tmp_path / "void")
