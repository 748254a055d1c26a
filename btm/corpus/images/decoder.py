"""Token ids of the one vocabulary back to text and pictures."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from btm.corpus.images.image_tokenizer import ImageTokenizer
from btm.corpus.images.pictures import save_png
from btm.corpus.images.vocabulary import MixedVocabulary, load_image_tokenizer
from btm.errors import DataError


@dataclass(frozen=True, slots=True)
class DecodedPicture:
    """A picture of a token sequence.

    Attributes:
        pixels: uint8 ``(size, size, 3)``; white where codes are missing.
        num_codes: Codes that the sequence held for it.
        is_complete: Whether these are all.
    """

    pixels: np.ndarray
    num_codes: int
    is_complete: bool


class MixedDecoder:
    """Decodes sequences of one forest.

    Attributes:
        vocabulary: Where the modalities lie.
        image_tokenizer: Codes to pixels.
    """

    def __init__(self, tokenizer_dir: Path | str) -> None:
        """Load the combined tokenizer of a forest.

        Raises:
            DataError: If it has no image codes, or no image tokenizer.
        """
        self.image_tokenizer = load_image_tokenizer(tokenizer_dir)
        vocabulary = MixedVocabulary.load(tokenizer_dir)
        assert vocabulary is not None
        self.vocabulary = vocabulary
        self._text = Tokenizer.from_file(str(Path(tokenizer_dir) / "tokenizer.json"))
        self._white = _white_code(self.image_tokenizer)

    def decode(self, ids: Sequence[int] | np.ndarray) -> list[str | DecodedPicture]:
        """Text and pictures in their order; special tokens are left out, text is never empty.

        A run of codes longer than a picture is several pictures; one that ends early is a picture with white patches.
        """
        found: list[str | DecodedPicture] = []
        for is_image, part in self._runs(np.asarray(ids, dtype=np.int64)):
            if is_image:
                found += self._pictures(part - self.vocabulary.first_code)
            elif text := self._text.decode(part.tolist(), skip_special_tokens=True):
                found.append(text)
        return found

    def images_of(self, ids: Sequence[int] | np.ndarray) -> list[DecodedPicture]:
        """The pictures of a sequence, in order."""
        return [part for part in self.decode(ids) if isinstance(part, DecodedPicture)]

    def save_images(self, ids: Sequence[int] | np.ndarray, directory: Path | str, stem: str = "image") -> list[Path]:
        """Write the pictures of a sequence as ``<stem>-<number>.png`` to ``directory``.

        Returns:
            The files, in order; none when the sequence holds no picture.
        """
        paths = []
        for number, picture in enumerate(self.images_of(ids), start=1):
            paths.append(Path(directory) / f"{stem}-{number}.png")
            save_png(picture.pixels, paths[-1])
        return paths

    def _runs(self, ids: np.ndarray) -> Iterator[tuple[bool, np.ndarray]]:
        """Stretches of ids of one modality; delimiters belong to the text and separate two pictures."""
        if ids.ndim != 1 or (ids.size and not (ids.min() >= 0 and ids.max() < self.vocabulary.size)):
            raise DataError(f"token ids must be one sequence in [0, {self.vocabulary.size}), got shape {ids.shape}")
        is_code = self.vocabulary.is_code(ids)
        borders = np.flatnonzero(np.diff(is_code)) + 1
        for part, kind in zip(np.split(ids, borders), np.split(is_code, borders), strict=True):
            if len(part):
                yield bool(kind[0]), part

    def _pictures(self, codes: np.ndarray) -> Iterator[DecodedPicture]:
        needed = self.image_tokenizer.num_patches
        for start in range(0, len(codes), needed):
            own = codes[start : start + needed]
            filled = np.concatenate([own, np.full(needed - len(own), self._white)])
            yield DecodedPicture(self.image_tokenizer.decode(filled), len(own), len(own) == needed)


def _white_code(tokenizer: ImageTokenizer) -> int:
    return int(tokenizer.encode(np.full((tokenizer.patch, tokenizer.patch, 3), 255, dtype=np.uint8))[0])
