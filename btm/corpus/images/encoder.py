"""Marked text to token ids of the one vocabulary."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from btm.corpus.images.marks import pieces
from btm.corpus.images.vocabulary import MixedVocabulary
from btm.corpus.tokenizer import TextEncoder


class MixedEncoder(TextEncoder):
    """Encodes documents whose text holds marks of pictures; text between two pictures is encoded by itself.

    Args:
        directory: Combined tokenizer.
        codes: Picture hash -> its image codes ``(G,)``.
    """

    def __init__(self, directory: Path | str, vocabulary: MixedVocabulary, codes: Mapping[str, np.ndarray]) -> None:
        super().__init__(directory)
        self._vocabulary, self._codes = vocabulary, codes

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Token ids of each marked text with the end-of-text token behind it, int64."""
        parts = [list(pieces(text)) for text in texts]
        segments = [content for document in parts for kind, content in document if kind == "text"]
        encoded = iter(self._tokenizer.encode_batch_fast(segments, add_special_tokens=False))
        documents: list[np.ndarray] = []
        for document in parts:
            ids = [
                np.array(next(encoded).ids, dtype=np.int64)
                if kind == "text"
                else self._vocabulary.image_ids(self._codes[content])
                for kind, content in document
            ]
            documents.append(np.concatenate([*ids, [self.eos_id]]).astype(np.int64))
        return documents
