"""What a preparation does beside the ordinary for domains with pictures; for domains of text all of it is nothing."""

import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from btm.config_data import DataConfig, TokenizerConfig
from btm.corpus.dedup import DocumentSet, Fate
from btm.corpus.encode import surveyed_texts
from btm.corpus.images.encoder import MixedEncoder
from btm.corpus.images.image_tokenizer import ImageTokenizer, train_image_tokenizer
from btm.corpus.images.sources import ImageSource
from btm.corpus.images.splits import Shown, drop_shared_pictures, load_shown, save_shown, shown_pictures, split_keys
from btm.corpus.images.vocabulary import IMAGE_TOKENIZER_DIR, MixedVocabulary, combine, load_image_tokenizer
from btm.corpus.sources import DomainSource
from btm.corpus.survey import Survey
from btm.corpus.tokenizer import TextEncoder
from btm.errors import DataError

_JUDGED_PICTURES = 2000


@dataclass(frozen=True, slots=True)
class _Pictures:
    """Pictures of a domain that is on its way to the shards."""

    source: ImageSource
    shown: Shown
    hashes: list[str]

    def of(self, documents: np.ndarray) -> list[str]:
        """Full hashes of the pictures of the chosen documents (bool per document), in ascending order."""
        chosen = set(self.shown[documents[self.shown[:, 0].astype(np.int64)], 1].tolist())
        return sorted(found for found in self.hashes if int(found[:16], 16) in chosen)


class ImageCorpus:
    """Pictures of one run of a preparation."""

    def __init__(self, corpus_dir: Path, tokenizer_dir: Path) -> None:
        self._corpus_dir, self._tokenizer_dir = corpus_dir, tokenizer_dir
        self._pictures: dict[str, _Pictures] = {}
        self._tokenizer: ImageTokenizer | None = None

    def note(self, source: DomainSource, data: DataConfig, survey: Survey) -> DocumentSet:
        """Remember which document of a surveyed domain shows which picture.

        Returns:
            The domain's documents with what their split depends on.
        """
        if not isinstance(source, ImageSource):
            return survey.documents
        every = np.ones(len(survey.sizes), dtype=bool)
        texts = ((number, text) for number, text, _ in surveyed_texts(source, data, survey, every))
        shown, hashes = shown_pictures(texts)
        self._pictures[source.domain] = _Pictures(source, shown, list(hashes))
        return replace(survey.documents, split_keys=split_keys(survey.documents.hashes, shown))

    def drop_shared(self, domain: str, fates: np.ndarray, others: Sequence[DocumentSet]) -> np.ndarray:
        """Fates of a domain's documents after those that repeat pictures across splits are dropped."""
        if domain not in self._pictures:
            return fates
        known = [(other.fates, self._shown(other.domain)) for other in others]
        return drop_shared_pictures(fates, self._pictures[domain].shown, known)

    def add_codes(
        self, text_dir: Path, origin: str | None, fates: Mapping[str, np.ndarray], wanted: TokenizerConfig, seed: int
    ) -> str:
        """Write the combined tokenizer: with image codes trained on training pictures, or those that came with it.

        Args:
            text_dir: Tokenizer to add to; removed when its content is in the combined one.
            origin: Directory that it was copied from, or None.
            fates: Domain -> fates of its documents, for the domains whose pictures count.
            wanted: Sizes.
            seed: Of the codebook.

        Returns:
            What came of it, in words.

        Raises:
            DataError: If there are no pictures, or the tokenizer takes no image codes.
        """
        if MixedVocabulary.load(text_dir) is not None:
            found = load_image_tokenizer(origin or text_dir)
            found.save(text_dir / IMAGE_TOKENIZER_DIR)
            text_dir.rename(self._tokenizer_dir)
            return f"image tokenizer: {found.num_codes} codes of {origin}"
        trained = train_image_tokenizer(
            self._training(fates, wanted),
            size=wanted.image_size,
            patch=wanted.image_patch,
            num_codes=wanted.image_codes,
            seed=seed,
        )
        trained.report["psnr_db"] = self._psnr(trained, fates)
        combine(text_dir, trained, self._tokenizer_dir)
        shutil.rmtree(text_dir, ignore_errors=True)
        figures = ", ".join(f"{name} {value:.2f} dB" for name, value in trained.report["psnr_db"].items())
        return (
            f"image tokenizer: {trained.num_codes} codes from {trained.report['pictures']:,} pictures, "
            f"{trained.num_patches} of them a picture of {trained.size} x {trained.size}; PSNR {figures or 'unknown'}"
        )

    def encoder(self, domain: str, fates: np.ndarray, text: TextEncoder) -> TextEncoder:
        """Encoder of a domain's documents: ``text`` itself where it has no pictures.

        Raises:
            DataError: If the forest's tokenizer has no image codes.
        """
        pictures = self._pictures.get(domain)
        if pictures is None:
            return text
        tokenizer, vocabulary = self.tokenizer(), MixedVocabulary.load(self._tokenizer_dir)
        assert vocabulary is not None
        pictures.source.index.bytes_per_picture = 3 * tokenizer.size**2
        wanted = pictures.of(fates <= Fate.test)
        codes = pictures.source.index.codes(wanted, tokenizer)
        return MixedEncoder(self._tokenizer_dir, vocabulary, dict(zip(wanted, codes, strict=True)))

    def save(self, domain: str, directory: Path) -> None:
        """Put what later domains need of the pictures of ``domain`` beside its shards."""
        if domain in self._pictures:
            save_shown(self._pictures[domain].shown, directory)

    def tokenizer(self) -> ImageTokenizer:
        """The forest's image tokenizer.

        Raises:
            DataError: If it has none.
        """
        if self._tokenizer is None:
            self._tokenizer = load_image_tokenizer(self._tokenizer_dir)
        return self._tokenizer

    def _shown(self, domain: str) -> Shown:
        if domain in self._pictures:
            return self._pictures[domain].shown
        return load_shown(self._corpus_dir / domain)

    def _training(self, fates: Mapping[str, np.ndarray], wanted: TokenizerConfig) -> Iterator[np.ndarray]:
        for pictures, hashes in self._chosen(fates, (Fate.train,), wanted.image_train_pictures):
            yield from pictures.source.index.pictures(hashes, wanted.image_size)

    def _psnr(self, trained: ImageTokenizer, fates: Mapping[str, np.ndarray]) -> dict[str, float]:
        """Reconstruction of training and of held-out pictures, where there are any."""
        found = {}
        for name, splits in (("train", (Fate.train,)), ("held-out", (Fate.dev, Fate.test))):
            chosen = self._chosen(fates, splits, _JUDGED_PICTURES)
            batches = [
                batch for pictures, hashes in chosen for batch in pictures.source.index.pictures(hashes, trained.size)
            ]
            if batches:
                found[name] = min(trained.psnr(np.concatenate(batches)), 1000.0)
        return found

    def _chosen(
        self, fates: Mapping[str, np.ndarray], splits: Sequence[Fate], count: int
    ) -> Iterator[tuple[_Pictures, list[str]]]:
        """An equal share of ``count`` pictures of each domain, chosen by hash."""
        domains = [domain for domain in fates if domain in self._pictures]
        for domain in domains:
            pictures = self._pictures[domain]
            yield pictures, pictures.of(np.isin(fates[domain], splits))[: -(-count // len(domains))]


def check_codes(tokenizer_dir: Path, domains: Sequence[str]) -> None:
    """Refuse domains with pictures in a forest whose tokenizer has no image codes.

    Raises:
        DataError: If there are any.
    """
    if domains and MixedVocabulary.load(tokenizer_dir) is None:
        raise DataError(
            f"domains {list(domains)} hold pictures (data.images), but the forest's tokenizer has no image codes: "
            "they are trained with the forest's first domains; begin a new forest with pictures among them"
        )
