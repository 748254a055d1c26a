"""First reading of a domain: hash, size and signature of every document, kept on disk, so that memory stays small.

A survey that a killed preparation left behind is used again when nothing that it depends on has changed.
"""

import shutil
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from btm.config_data import DataConfig
from btm.corpus.dedup import DocumentSet
from btm.corpus.faults import Faults
from btm.corpus.progress import ProgressLine
from btm.corpus.shingles import NUM_HASHES, signatures
from btm.corpus.sources import DomainSource
from btm.errors import ForestError
from btm.files import directory_in_one_step, read_json, write_json

FORMAT = 1
_BATCH_BYTES = 1 << 21
_BATCH_DOCUMENTS = 4096
_HASHES, _SIZES, _SIGNATURES, _RECORD = "hashes.npy", "sizes.npy", "signatures.bin", "survey.json"
DOCUMENT_FILES = (_HASHES, _SIGNATURES)
"""What later domains need of this one."""


@dataclass(frozen=True, slots=True)
class Survey:
    """Result of the first reading.

    Attributes:
        documents: Hashes and signatures, fates undecided.
        sizes: UTF-8 bytes of each document, int64.
        broken: Kind of fault -> documents left out.
        fault_summary: The same in one sentence, or empty.
    """

    documents: DocumentSet
    sizes: np.ndarray
    broken: dict[str, int]
    fault_summary: str


def text_hash(data: bytes) -> int:
    """64-bit hash of a document's UTF-8 text."""
    return xxhash.xxh3_64_intdigest(data)


def survey_settings(source: DomainSource, data: DataConfig) -> dict[str, Any]:
    """Everything that a survey depends on, as JSON."""
    return {
        "format": FORMAT,
        "sources": source.identity,
        "text_field": data.text_field,
        "on_error": str(data.on_error),
        "max_documents": data.max_documents,
        "signatures": data.near_duplicate_threshold < 1,
    }


def take_survey(source: DomainSource, data: DataConfig, directory: Path, progress: ProgressLine) -> Survey:
    """Read the domain once, or load the survey in ``directory`` if it still holds; writes ``directory``.

    Raises:
        DataError: If a document is broken and ``data.on_error`` is stop.
    """
    settings = survey_settings(source, data)
    if not _is_current(directory, settings):
        shutil.rmtree(directory, ignore_errors=True)
        with directory_in_one_step(directory) as temporary:
            _read(source, data, temporary, settings, progress)
    return load_survey(source.domain, directory)


def load_survey(domain: str, directory: Path) -> Survey:
    """Load the survey in ``directory``."""
    record = read_json(directory / _RECORD)
    sizes = np.load(directory / _SIZES, allow_pickle=False)
    return Survey(load_documents(domain, directory), sizes, record["broken"], record["fault_summary"])


def load_documents(domain: str, directory: Path) -> DocumentSet:
    """Load hashes and signatures from ``directory``; signatures stay on disk, memory-mapped."""
    hashes = np.load(directory / _HASHES, allow_pickle=False)
    path = directory / _SIGNATURES
    if path.stat().st_size == 0:
        return DocumentSet(domain, hashes, np.zeros((0, NUM_HASHES), dtype=np.uint8))
    return DocumentSet(domain, hashes, np.memmap(path, dtype=np.uint8, mode="r").reshape(len(hashes), NUM_HASHES))


def _is_current(directory: Path, settings: dict[str, Any]) -> bool:
    try:
        return read_json(directory / _RECORD)["settings"] == settings
    except (ForestError, KeyError, TypeError):
        return False


def _read(
    source: DomainSource, data: DataConfig, directory: Path, settings: dict[str, Any], progress: ProgressLine
) -> None:
    faults = Faults(source.domain, data.on_error)
    hashes, sizes = array("Q"), array("q")
    total = 0
    with open(directory / _SIGNATURES, "wb") as file:
        for batch in _batches(source, data, faults):
            hashes.extend(text_hash(text) for text in batch)
            sizes.extend(len(text) for text in batch)
            total += sum(map(len, batch))
            if settings["signatures"]:
                file.write(signatures(batch).tobytes())
            progress.show(f"{source.domain}: read {len(sizes):,} documents, {total / 1e6:,.1f} MB")
    np.save(directory / _HASHES, np.array(hashes, dtype=np.uint64), allow_pickle=False)
    np.save(directory / _SIZES, np.array(sizes, dtype=np.int64), allow_pickle=False)
    record = {"settings": settings, "broken": dict(sorted(faults.counts.items())), "fault_summary": faults.summary}
    write_json(directory / _RECORD, record)


def _batches(source: DomainSource, data: DataConfig, faults: Faults) -> Iterator[list[bytes]]:
    batch: list[bytes] = []
    size = 0
    for document in source.documents(data, faults):
        text = document.text.encode()
        batch.append(text)
        size += len(text)
        if size >= _BATCH_BYTES or len(batch) >= _BATCH_DOCUMENTS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def keep_documents(survey_dir: Path, domain_dir: Path) -> None:
    """Put what later domains need beside the shards."""
    for name in DOCUMENT_FILES:
        shutil.copyfile(survey_dir / name, domain_dir / name)
