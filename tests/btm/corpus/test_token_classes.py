import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from btm.corpus.token_classes import TOKEN_CLASSES, class_of, token_classes
from btm.corpus.tokenizer import EOS_TOKEN, TextEncoder, plain_tokens, train_tokenizer
from btm.errors import DataError


@pytest.mark.parametrize(
    ("text", "name"),
    [
        (" tree", "word_start"),
        ("ing", "word_inside"),
        ("über", "word_inside"),
        (" 3rd", "word_start"),
        (" 1999", "number"),
        ("7", "number"),
        ("):", "punctuation"),
        (" =", "punctuation"),
        ("\n    ", "white_space"),
        ("", "other"),
        ("\ufffd", "other"),
    ],
)
def test_what_a_token_is(text, name):
    assert TOKEN_CLASSES[class_of(text)] == name


def test_a_byte_level_vocabulary(tmp_path):
    train_tokenizer(["the tree and the trees, 12 of them\n" * 50], tmp_path, vocab_size=300)
    classes, texts = token_classes(tmp_path), plain_tokens(tmp_path)
    encoder = TextEncoder(tmp_path)
    assert classes.shape == (encoder.vocab_size,)
    assert TOKEN_CLASSES[classes[encoder.eos_id]] == "other"
    ids = encoder.encode(["the tree"])[0][:-1]
    assert "".join(texts[number] or "" for number in ids) == "the tree"
    assert TOKEN_CLASSES[classes[ids[-1]]].startswith("word")
    assert {TOKEN_CLASSES[number] for number in np.unique(classes)} >= {"word_start", "number", "punctuation", "other"}


def test_the_mark_of_sentencepiece_is_a_space(tmp_path):
    tokenizer = Tokenizer(models.BPE({EOS_TOKEN: 0, "\u2581": 1, "a": 2, "\u2581a": 3}, [("\u2581", "a")]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer.add_special_tokens([EOS_TOKEN])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert plain_tokens(tmp_path)[2:] == ["a", " a"]
    assert [TOKEN_CLASSES[number] for number in token_classes(tmp_path)[2:]] == ["word_inside", "word_start"]


def test_a_missing_tokenizer_is_named(tmp_path):
    with pytest.raises(DataError, match="tokenizer"):
        token_classes(tmp_path)
