"""How a document with pictures is written as one string: each picture a mark that no text can hold.

The string goes through the ordinary preparation (hashes, duplicates, near duplicates); only its encoding differs. A
mark is a picture's hash between two code points that Unicode keeps for internal use.
"""

import re
from collections.abc import Iterator

OPEN, CLOSE = "\ufdd0", "\ufdd1"
_MARK = re.compile(f"{OPEN}([0-9a-f]{{32}}){CLOSE}")


def mark(picture_hash: str) -> str:
    """The mark of a picture, of 32 hexadecimal digits."""
    return f"{OPEN}{picture_hash}{CLOSE}"


def has_reserved(text: str) -> bool:
    """Whether ``text`` holds a code point that marks are made of."""
    return OPEN in text or CLOSE in text


def pieces(text: str) -> Iterator[tuple[str, str]]:
    """Parts of a marked text in order, as ``("text", content)`` and ``("image", picture hash)``; no empty text."""
    for index, part in enumerate(_MARK.split(text)):
        if part:
            yield ("image" if index % 2 else "text"), part


def pictures_in(text: str) -> list[str]:
    """Hashes of the pictures of a marked text, in order, repeated where they are."""
    return _MARK.findall(text)


def plain(text: str) -> str:
    """A marked text without its pictures."""
    return _MARK.sub("", text)
