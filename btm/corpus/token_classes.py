"""What kind of text a token is, so that one can see whether experts divide the tokens by it."""

from pathlib import Path

import numpy as np

from btm.corpus.images.vocabulary import modality_starts
from btm.corpus.tokenizer import plain_tokens

TOKEN_CLASSES = ("word_start", "word_inside", "number", "punctuation", "white_space", "picture", "other")
"""Names of the classes, in the order of their numbers."""
_WORD_START, _WORD_INSIDE, _NUMBER, _PUNCTUATION, _WHITE_SPACE, _PICTURE, _OTHER = range(len(TOKEN_CLASSES))
_UNREADABLE = "\ufffd"


def token_classes(tokenizer_dir: Path | str) -> np.ndarray:
    """Class of each entry of a vocabulary.

    Args:
        tokenizer_dir: Directory of the tokenizer.

    Returns:
        Numbers of :data:`TOKEN_CLASSES`, int64 ``(vocabulary,)``.

    Raises:
        DataError: If the tokenizer is missing or damaged.
    """
    classes = np.array([_OTHER if text is None else class_of(text) for text in plain_tokens(tokenizer_dir)])
    for first_code in modality_starts(tokenizer_dir):
        classes[first_code:] = _PICTURE
    return classes.astype(np.int64)


def class_of(text: str) -> int:
    """Class of one token that stands for ``text``; a leading space belongs to it.

    Letters make a word, whatever else there is; else digits make a number. What is not a whole character is other.
    """
    if not text or _UNREADABLE in text:
        return _OTHER
    if text.isspace():
        return _WHITE_SPACE
    if any(letter.isalpha() for letter in text):
        return _WORD_START if text[0].isspace() else _WORD_INSIDE
    return _NUMBER if any(digit.isdigit() for digit in text) else _PUNCTUATION
