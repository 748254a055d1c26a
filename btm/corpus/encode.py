"""Second reading of a domain: its documents as token shards, in a directory that appears only when it is complete."""

from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from btm.config_data import DataConfig
from btm.corpus.dedup import Fate
from btm.corpus.faults import Faults
from btm.corpus.progress import ProgressLine
from btm.corpus.shards import ShardWriter
from btm.corpus.sources import DomainSource
from btm.corpus.survey import Survey, text_hash
from btm.corpus.tokenizer import TextEncoder
from btm.errors import DataError
from btm.records import SplitInfo

SPLITS = ("train", "dev", "test")
"""In the order of :class:`btm.corpus.dedup.Fate`."""
_BATCH_BYTES = 1 << 21
_BATCH_DOCUMENTS = 4096


@dataclass(slots=True)
class _Batch:
    texts: list[str] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    fates: list[int] = field(default_factory=list)
    bytes: int = 0

    @property
    def is_full(self) -> bool:
        return self.bytes >= _BATCH_BYTES or len(self.texts) >= _BATCH_DOCUMENTS


def surveyed_texts(
    source: DomainSource, data: DataConfig, survey: Survey, chosen: np.ndarray
) -> Iterator[tuple[int, str, int]]:
    """Read the domain again and give the ``chosen`` documents (bool per document).

    Yields:
        Number, text and bytes (of UTF-8, unless the document says what it stands for) of each.

    Raises:
        DataError: If the text is not what the survey saw.
    """
    count = 0
    for number, document in enumerate(source.documents(data, Faults(source.domain, data.on_error))):
        encoded = document.text.encode()
        if number >= len(chosen) or text_hash(encoded) != int(survey.documents.hashes[number]):
            raise DataError(f"{document.path} changed while domain {source.domain} was being prepared; run it again")
        count += 1
        if chosen[number]:
            size = len(encoded) if document.num_bytes is None else document.num_bytes
            yield number, document.text, size
    if count != len(chosen):
        raise DataError(f"domain {source.domain} lost documents while it was being prepared; run it again")


def encode_domain(
    source: DomainSource,
    data: DataConfig,
    survey: Survey,
    fates: np.ndarray,
    *,
    encoder: TextEncoder,
    directory: Path,
    progress: ProgressLine,
) -> dict[str, SplitInfo]:
    """Write the three shards of a domain to ``directory``.

    Encoding runs in the threads of the tokenizer library while the next documents are read.

    Raises:
        DataError: If the text has changed since the survey.
    """
    kept = fates <= Fate.test
    texts = surveyed_texts(source, data, survey, kept)
    total, written = int(kept.sum()), 0
    with ExitStack() as stack:
        writers = [stack.enter_context(ShardWriter(directory / split, encoder.vocab_size)) for split in SPLITS]
        for batch, encoded in _encoded(_batches(texts, fates), encoder):
            for ids, size, fate in zip(encoded, batch.sizes, batch.fates, strict=True):
                writers[fate].add(ids, size)
            written += len(encoded)
            progress.show(f"{source.domain}: encoded {written:,} of {total:,} documents")
        return {
            split: SplitInfo(documents=writer.num_documents, tokens=writer.num_tokens, bytes=writer.num_bytes)
            for split, writer in zip(SPLITS, writers, strict=True)
        }


def _batches(texts: Iterable[tuple[int, str, int]], fates: np.ndarray) -> Iterator[_Batch]:
    batch = _Batch()
    for number, text, size in texts:
        batch.texts.append(text)
        batch.sizes.append(size)
        batch.fates.append(int(fates[number]))
        batch.bytes += size
        if batch.is_full:
            yield batch
            batch = _Batch()
    if batch.texts:
        yield batch


def _encoded(batches: Iterable[_Batch], encoder: TextEncoder) -> Iterator[tuple[_Batch, list[np.ndarray]]]:
    """Encode each batch while the next one is read; one batch is ahead at most."""
    with ThreadPoolExecutor(max_workers=1) as pool:
        waiting: tuple[_Batch, Future[list[np.ndarray]]] | None = None
        for batch in batches:
            future = pool.submit(encoder.encode, batch.texts)
            if waiting:
                yield waiting[0], waiting[1].result()
            waiting = batch, future
        if waiting:
            yield waiting[0], waiting[1].result()
