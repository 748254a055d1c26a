"""One vocabulary for text and pictures: text ids first, then ``<image>`` and ``</image>``, then the image codes.

It is an ordinary Hugging Face tokenizer whose added tokens are the image codes, so that everything that knows token
ids alone (shards, models, scores) works unchanged. The names of the codes carry the beginning of the codebook's
fingerprint: two tokenizers are equal only if their pictures mean the same.
"""

import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from tokenizers import AddedToken, Tokenizer

from btm.corpus.images.image_tokenizer import ImageTokenizer
from btm.corpus.tokenizer import refuse_code
from btm.errors import DataError, ForestError
from btm.files import directory_in_one_step, read_json

TEXT, IMAGE = 0, 1
MODALITIES = ("text", "image")
"""Names of the modality ids."""
BEGIN, END = "<image>", "</image>"
IMAGE_TOKENIZER_DIR = "image_tokenizer"
"""Folder of the image tokenizer inside of a forest's tokenizer directory."""
_CODE_NAME = re.compile(r"<image:([0-9a-f]{12}):(\d+)>")


@dataclass(frozen=True, slots=True)
class MixedVocabulary:
    """Where the modalities lie among the token ids.

    Attributes:
        begin_id: ``<image>``, which stands before the codes of a picture.
        end_id: ``</image>``, which stands behind them.
        first_code: Token id of image code 0.
        num_codes: Image codes; they have the ids ``first_code ... first_code + num_codes - 1``.
        fingerprint: Beginning of the codebook's fingerprint.
    """

    begin_id: int
    end_id: int
    first_code: int
    num_codes: int
    fingerprint: str

    @property
    def size(self) -> int:
        """One more than the largest token id."""
        return self.first_code + self.num_codes

    @classmethod
    def load(cls, directory: Path | str) -> Self | None:
        """The vocabulary of any tokenizer or model directory; None when it has no image codes.

        Raises:
            DataError: If ``tokenizer.json`` is missing or damaged, or its image codes are.
        """
        path = Path(directory) / "tokenizer.json"
        try:
            added = {str(entry["content"]): int(entry["id"]) for entry in read_json(path)["added_tokens"]}
        except (ForestError, OSError, KeyError, TypeError, ValueError) as error:
            raise DataError(f"tokenizer: {path} cannot be read ({error}); take it from its source again") from None
        named = [(match, token_id) for name, token_id in added.items() if (match := _CODE_NAME.fullmatch(name))]
        if not named:
            return None
        codes = {int(match[2]): token_id for match, token_id in named}
        first, prints = codes.get(0, -1), {match[1] for match, _ in named}
        whole = codes == {code: first + code for code in range(len(named))} and len(prints) == 1
        if not whole or BEGIN not in added or END not in added:
            raise DataError(f"{path} has image codes that are not whole; take it from its source again")
        return cls(added[BEGIN], added[END], first, len(codes), prints.pop())

    def image_ids(self, codes: np.ndarray) -> np.ndarray:
        """Token ids of one picture ``(codes + 2,)``, delimiters included."""
        return np.concatenate([[self.begin_id], codes + self.first_code, [self.end_id]]).astype(np.int64)

    def is_code(self, ids: np.ndarray) -> np.ndarray:
        """Whether each id is an image code; bool of the same shape."""
        return (ids >= self.first_code) & (ids < self.size)

    def modality_table(self, size: int | None = None) -> np.ndarray:
        """Modality of every token id, int64 ``(size,)``: ``table[ids]`` are the modality ids of tokens.

        Image codes are :data:`IMAGE`; everything else, ``<image>`` and ``</image>`` included, is :data:`TEXT`.

        Args:
            size: Length, for a model whose vocabulary is padded; None is that of the tokenizer.

        Raises:
            DataError: If ``size`` is smaller than the vocabulary.
        """
        size = self.size if size is None else size
        if size < self.size:
            raise DataError(f"a modality table of {size} entries is shorter than the vocabulary of {self.size}")
        return self.is_code(np.arange(size)).astype(np.int64) * IMAGE


def modality_table(tokenizer_dir: Path | str, size: int | None = None) -> np.ndarray:
    """Modality of every token id of the tokenizer in ``tokenizer_dir``; see :meth:`MixedVocabulary.modality_table`.

    A tokenizer without image codes has text alone.

    Raises:
        DataError: If the tokenizer is missing or damaged, or ``size`` is smaller than its vocabulary.
    """
    vocabulary = MixedVocabulary.load(tokenizer_dir)
    if vocabulary is not None:
        return vocabulary.modality_table(size)
    tokenizer = Tokenizer.from_file(str(Path(tokenizer_dir) / "tokenizer.json"))
    found = max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1
    if size is not None and size < found:
        raise DataError(f"a modality table of {size} entries is shorter than the vocabulary of {found}")
    return np.full(found if size is None else size, TEXT, dtype=np.int64)


def modality_starts(tokenizer_dir: Path | str) -> tuple[int, ...]:
    """First token id of each modality after text, which says the same as :func:`modality_table`: ``(first_code,)``.

    Empty for a tokenizer without image codes.

    Raises:
        DataError: If the tokenizer is missing or damaged.
    """
    vocabulary = MixedVocabulary.load(tokenizer_dir)
    return () if vocabulary is None else (vocabulary.first_code,)


def modality_of(ids: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Modality ids of token ids of any shape.

    Raises:
        DataError: If an id is outside of the table.
    """
    if ids.size and not (ids.min() >= 0 and ids.max() < len(table)):
        raise DataError(f"token ids must lie in [0, {len(table)}), got {ids.min()} to {ids.max()}")
    return table[ids]


def loss_by_modality(logp: np.ndarray, ids: np.ndarray, table: np.ndarray) -> dict[str, float]:
    """Mean negative log-probability of the tokens of each modality, in nats; a modality without tokens is left out.

    Args:
        logp: Log-probability of each token, any shape.
        ids: The tokens that were predicted, of the same shape.
        table: See :func:`modality_table`.

    Raises:
        DataError: If the shapes differ, or an id is outside of the table.
    """
    if logp.shape != ids.shape:
        raise DataError(f"log-probabilities {logp.shape} must be as many as tokens {ids.shape}")
    modality = modality_of(ids, table)
    return {
        name: -float(logp[modality == number].mean(dtype=np.float64))
        for number, name in enumerate(MODALITIES)
        if (modality == number).any()
    }


def load_image_tokenizer(tokenizer_dir: Path | str) -> ImageTokenizer:
    """The image tokenizer that belongs to the tokenizer in ``tokenizer_dir``.

    Raises:
        DataError: If there is none, or it is not the one that the token names speak of.
    """
    vocabulary = MixedVocabulary.load(tokenizer_dir)
    if vocabulary is None:
        raise DataError(
            f"the tokenizer in {tokenizer_dir} has no image codes; begin a new forest with domains in data.images"
        )
    found = ImageTokenizer.load(Path(tokenizer_dir) / IMAGE_TOKENIZER_DIR)
    if not found.fingerprint.startswith(vocabulary.fingerprint) or found.num_codes != vocabulary.num_codes:
        raise DataError(
            f"the image tokenizer in {tokenizer_dir} has fingerprint {found.fingerprint[:12]}, its token names say "
            f"{vocabulary.fingerprint}; restore both from one copy"
        )
    return found


def combine(text_dir: Path | str, image_tokenizer: ImageTokenizer, directory: Path | str) -> MixedVocabulary:
    """Write the tokenizer of ``text_dir`` with the image codes behind it, and the image tokenizer, to ``directory``.

    Args:
        text_dir: Hugging Face tokenizer directory with ``tokenizer.json``.
        image_tokenizer: Whose codes are added.
        directory: Replaced in one step.

    Raises:
        DataError: If the text tokenizer already has tokens of these names, or its ids have holes.
    """
    text_dir = Path(text_dir)
    refuse_code(text_dir)
    tokenizer = Tokenizer.from_file(str(text_dir / "tokenizer.json"))
    taken = tokenizer.get_vocab(with_added_tokens=True)
    fingerprint = image_tokenizer.fingerprint[:12]
    names = [BEGIN, END, *(f"<image:{fingerprint}:{code}>" for code in range(image_tokenizer.num_codes))]
    if known := [name for name in names if name in taken]:
        raise DataError(f"the tokenizer in {text_dir} already has a token {known[0]!r}; give a tokenizer of text alone")
    tokenizer.add_special_tokens(_special(names))
    first = max(taken.values()) + 1
    if [tokenizer.token_to_id(name) for name in names] != list(range(first, first + len(names))):
        raise DataError(f"the tokenizer in {text_dir} has ids without tokens; image codes need ids one after the other")
    with directory_in_one_step(Path(directory)) as temporary:
        for file in text_dir.iterdir():
            if file.is_file() and file.name != "tokenizer.json":
                shutil.copyfile(file, temporary / file.name)
        (temporary / "tokenizer.json").write_text(tokenizer.to_str(pretty=True) + "\n", encoding="utf-8")
        image_tokenizer.save(temporary / IMAGE_TOKENIZER_DIR)
        found = MixedVocabulary.load(temporary)
    if found is None:
        raise DataError(f"the tokenizer in {text_dir} does not keep added tokens; give another")
    return found


def _special(names: Sequence[str]) -> list[Any]:
    # Special, so that text which spells such a name stays text (see TextEncoder).
    return [AddedToken(name, special=True, normalized=False) for name in names]
