"""Domains whose documents hold pictures, as sources of the ordinary preparation."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from itertools import islice
from typing import Any

from btm.config_data import DataConfig, OnError
from btm.corpus.faults import Faults
from btm.corpus.files_of_domain import LINE_SUFFIXES, file_kind
from btm.corpus.images.documents import RowError, picture_paths, read_image_documents
from btm.corpus.images.index import PictureIndex, stamps
from btm.corpus.randomness import hash_text
from btm.corpus.readers import Document, read_rows
from btm.corpus.sources import DomainSource
from btm.errors import DataError


@dataclass(frozen=True)
class ImageSource(DomainSource):
    """A domain of JSON lines with pictures; the text of its documents holds marks in their place.

    Attributes:
        caption_keys: Keys of nested captions to keep.
        index: Reads and hashes the pictures.
    """

    caption_keys: tuple[str, ...] = ()
    index: PictureIndex = field(default_factory=PictureIndex)

    @property
    def identity(self) -> list[list[Any]]:
        """That of the JSON lines, the captions that are kept, and size and time of the pictures in one entry."""
        paths = []
        for row in read_rows(self.files, Faults(self.domain, OnError.skip)):
            try:
                paths += picture_paths(row)
            except RowError:
                continue
        _, total, rows = stamps(paths)
        digest = hash_text(*(str(part) for row in rows for part in row))
        keys = [[f"the choice of captions {list(self.caption_keys)}", 0, 0]] if self.caption_keys else []
        return [*super().identity, *keys, [f"a picture of domain {self.domain}", total, digest]]

    def documents(self, data: DataConfig, faults: Faults) -> Iterator[Document]:
        """The domain's sound documents in order, ``data.max_documents`` at most."""
        found = read_image_documents(
            self.files, text_field=data.text_field, caption_keys=self.caption_keys, index=self.index, faults=faults
        )
        return islice(found, data.max_documents)


def with_images(sources: Sequence[DomainSource], data: DataConfig) -> list[DomainSource]:
    """The same sources, those that ``data.images`` names with their pictures.

    Raises:
        DataError: If such a domain has files that are not JSON lines; all problems together.
    """
    problems = [
        f"domain {source.domain} is text of this installation and holds no pictures; take it out of data.images"
        for source in sources
        if source.domain in data.images and source.local is not None
    ]
    problems += [
        f"data of domain {source.domain}: {path} is not JSON lines, the form of domains in data.images; name the "
        "JSON-lines file in data.domains"
        for source in sources
        if source.domain in data.images
        for path in source.files
        if path.is_dir() or file_kind(path) not in LINE_SUFFIXES
    ]
    if problems:
        raise DataError("\n".join(problems))
    return [_with_images(source, data) if source.domain in data.images else source for source in sources]


def _with_images(source: DomainSource, data: DataConfig) -> ImageSource:
    given = {entry.name: getattr(source, entry.name) for entry in fields(DomainSource)}
    return ImageSource(**given, caption_keys=tuple(data.caption_keys), index=PictureIndex(data.num_workers))
