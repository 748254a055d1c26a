"""A prepared domain on disk: whether it is whole, what it was made from, and whether it can be used again.

``<corpus>/<domain>/`` holds the shards, ``corpus.json``, ``prepared.json`` (what it was made from) and the hashes,
signatures and fates of its documents, which later domains are compared with.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from btm.config_data import DataConfig
from btm.corpus.dedup import DocumentSet
from btm.corpus.encode import SPLITS
from btm.corpus.shards import shard_paths
from btm.corpus.sources import DomainSource, describe_change
from btm.corpus.survey import DOCUMENT_FILES, load_documents, survey_settings
from btm.errors import BtmError, DataError
from btm.files import read_json, sha256_of_file, sha256_of_json, write_json
from btm.records import PICTURES_FILE, DomainInfo

_FATES, _RECORD, INFO_FILE = "fates.npy", "prepared.json", "corpus.json"


def domain_settings(source: DomainSource, data: DataConfig, tokenizer_sha256: str) -> dict[str, Any]:
    """Everything but other domains that the shards of a domain depend on, as JSON."""
    return {
        **survey_settings(source, data),
        **source.split_fractions(data),
        "near_duplicate_threshold": data.near_duplicate_threshold,
        "tokenizer": tokenizer_sha256,
    }


def fingerprint(directory: Path, settings: dict[str, Any]) -> str:
    """SHA-256 over the shards in ``directory`` and the settings that shaped them; not over where the text lay."""
    files = {path.name: sha256_of_file(path) for split in SPLITS for path in shard_paths(directory / split)}
    shaping = {key: settings[key] for key in settings if key != "sources"}
    return sha256_of_json({"files": files, "settings": shaping})


def documents_sha256(documents: DocumentSet) -> str:
    """SHA-256 of which documents a domain has and what became of them."""
    return hashlib.sha256(documents.hashes.tobytes() + documents.fates.tobytes()).hexdigest()


@dataclass(frozen=True, slots=True)
class Provenance:
    """What a prepared domain was made from.

    Attributes:
        settings: See :func:`domain_settings`.
        checked_against: Earlier domain -> hash of its documents.
        warnings: What there was to say; said again whenever the domain is used again.
    """

    settings: dict[str, Any]
    checked_against: dict[str, str]
    warnings: list[str]


@dataclass(frozen=True, slots=True)
class Reuse:
    """Whether a prepared domain can be used again.

    Attributes:
        info: Its record, or None if it has to be prepared.
        reason: Why, in words; empty when nothing was there.
        warnings: Those of its preparation.
    """

    info: DomainInfo | None
    reason: str = ""
    warnings: Sequence[str] = ()


def write_records(directory: Path, info: DomainInfo, fates: np.ndarray, provenance: Provenance) -> None:
    """Write all but the shards and the documents' hashes and signatures to ``directory``."""
    np.save(directory / _FATES, fates, allow_pickle=False)
    write_json(directory / _RECORD, asdict(provenance) | {"document_files": _document_files(directory)})
    info.save(directory / INFO_FILE)


def load_prepared_documents(directory: Path) -> DocumentSet:
    """Hashes, signatures and fates of the prepared domain in ``directory``.

    Raises:
        DataError: If a file is missing or damaged.
    """
    try:
        if read_json(directory / _RECORD)["document_files"] != _document_files(directory):
            raise DataError("checksums differ")
        fates = np.load(directory / _FATES, allow_pickle=False)
        return replace(load_documents(directory.name, directory), fates=fates)
    except (BtmError, OSError, KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"the prepared domain {directory} is damaged ({error}); remove it and prepare it again"
        ) from None


def _document_files(directory: Path) -> dict[str, str]:
    names = [*DOCUMENT_FILES, _FATES, *([PICTURES_FILE] if (directory / PICTURES_FILE).is_file() else [])]
    return {name: sha256_of_file(directory / name) for name in names}


def prepared_domains(corpus_dir: Path) -> list[str]:
    """Names of the domains that are prepared in ``corpus_dir``, in alphabetical order."""
    if not corpus_dir.is_dir():
        return []
    found = (path.parent.name for path in corpus_dir.glob(f"*/{INFO_FILE}"))
    return sorted(name for name in found if not name.startswith("."))


def look_for(directory: Path, settings: dict[str, Any], earlier: Sequence[DocumentSet]) -> Reuse:
    """Whether the prepared domain in ``directory`` answers the present request.

    Args:
        directory: Of the domain.
        settings: See :func:`domain_settings`.
        earlier: Domains that stand before it in the present request.
    """
    if not (directory / INFO_FILE).is_file():
        return Reuse(None)
    try:
        info, stored = DomainInfo.load(directory / INFO_FILE), read_json(directory / _RECORD)
        record = Provenance(**{field.name: stored[field.name] for field in fields(Provenance)})
        if record.settings != settings:
            return Reuse(None, _difference(record.settings, settings))
        for other in earlier:
            if record.checked_against.get(other.domain) != documents_sha256(other):
                return Reuse(None, f"domain {other.domain}, whose documents it must not share, is new or has changed")
        if fingerprint(directory, settings) != info.fingerprint:
            return Reuse(None, "its files are damaged")
        load_prepared_documents(directory)
    except (BtmError, OSError, AttributeError, KeyError, TypeError) as error:
        return Reuse(None, f"its files are damaged ({error})")
    return Reuse(info, warnings=record.warnings)


def _difference(old: dict[str, Any], new: dict[str, Any]) -> str:
    for key in new:
        if old.get(key) != new[key]:
            if key == "sources":
                return describe_change(old[key], new[key])
            return f"{key} was {old.get(key)!r} and is {new[key]!r} now"
    return "its settings have changed"
