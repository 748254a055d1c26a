"""Text to token shards: ``python -m btm.corpus.worker spec.json`` runs a :class:`btm.requests.PrepareSpec`.

Each domain is read twice: a survey (hashes, near-duplicate signatures), then the encoding of the documents that stay.
Memory holds a few batches of text, whatever the size of the corpus. Finished domains are used again; a killed
preparation goes on with the domain it was at.
"""

import contextlib
import errno
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from btm.config_data import OnError
from btm.corpus.dedup import DocumentSet, Fate, decide_fates
from btm.corpus.encode import encode_domain, surveyed_texts
from btm.corpus.images.corpus import ImageCorpus, check_codes
from btm.corpus.images.marks import plain
from btm.corpus.images.sources import ImageSource, with_images
from btm.corpus.prepared import (
    Provenance,
    documents_sha256,
    domain_settings,
    fingerprint,
    load_prepared_documents,
    look_for,
    prepared_domains,
    write_records,
)
from btm.corpus.progress import ProgressLine
from btm.corpus.sizes import check_sizes, size_problems
from btm.corpus.sources import DomainSource, find_sources
from btm.corpus.survey import Survey, keep_documents, take_survey
from btm.corpus.tokenizer import TextEncoder, copy_tokenizer, tokenizer_sha256, train_tokenizer
from btm.errors import BtmError, DataError
from btm.files import directory_in_one_step, exclusive_lock, remove_leftovers
from btm.records import DomainInfo, PrepareResult
from btm.requests import PrepareSpec

_FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
_SHARED_LIMIT = 0.01
_SURVEY_DIR = ".survey"


@dataclass(slots=True)
class _Pending:
    """A domain on its way to the shards."""

    source: DomainSource
    survey: Survey
    fates: np.ndarray
    checked_against: dict[str, str]
    warnings: list[str]


class _TooLittleTextError(Exception):
    """Keeps a domain from being published; :func:`check_sizes` says what all domains lack together."""


class Preparation:
    """One run of a :class:`btm.requests.PrepareSpec`; use :func:`prepare`."""

    def __init__(self, spec: PrepareSpec, progress: ProgressLine) -> None:
        self.spec = spec
        self.output = Path(spec.output_dir)
        self.tokenizer_dir = Path(spec.tokenizer_dir)
        self.progress = progress
        self.warnings: list[str] = []
        self.sources = with_images(find_sources(spec.data), spec.data)
        self.images = ImageCorpus(self.output, self.tokenizer_dir)
        self.infos: dict[str, DomainInfo] = {}
        self.known: dict[str, DocumentSet] = {}
        self.pending: dict[str, _Pending] = {}

    def run(self) -> PrepareResult:
        """Do everything that is not done yet."""
        remove_leftovers(self.output)
        remove_leftovers(self.output / _SURVEY_DIR)
        for leftover in self.tokenizer_dir.parent.glob(f".tmp-{self.tokenizer_dir.name}-*"):
            shutil.rmtree(leftover, ignore_errors=True)
        for source in self.sources:
            self._reuse_or_survey(source)
        self._ensure_tokenizer()
        encoder, digest = TextEncoder(self.tokenizer_dir), tokenizer_sha256(self.tokenizer_dir)
        for pending in self.pending.values():
            with contextlib.suppress(_TooLittleTextError):
                self._encode(pending, encoder, digest)
        shutil.rmtree(self.output / _SURVEY_DIR, ignore_errors=True)
        infos = {source.domain: self.infos[source.domain] for source in self.sources}
        check_sizes(self.sources, infos, self.spec.data.min_train_tokens)
        return PrepareResult(
            spec_sha256=self.spec.sha256,
            tokenizer_sha256=digest,
            vocab_size=encoder.vocab_size,
            domains=infos,
            warnings=self.warnings,
        )

    def _reuse_or_survey(self, source: DomainSource) -> None:
        directory = self.output / source.domain
        earlier = list(self.known.values())
        if (self.tokenizer_dir / "tokenizer.json").is_file():
            settings = domain_settings(source, self.spec.data, tokenizer_sha256(self.tokenizer_dir))
            found = look_for(directory, settings, earlier)
            if found.info:
                self.infos[source.domain] = found.info
                self.known[source.domain] = load_prepared_documents(directory)
                self.warnings += found.warnings
                return
            if found.reason:
                self.progress.say(f"domain {source.domain} is prepared again: {found.reason}")
        survey = take_survey(source, self.spec.data, self.output / _SURVEY_DIR / source.domain, self.progress)
        others = [*earlier, *self._domains_on_disk()]
        fates, warnings = self._decide(source, survey, others)
        self.known[source.domain] = replace(survey.documents, fates=fates)
        checked = {other.domain: documents_sha256(other) for other in others}
        self.pending[source.domain] = _Pending(source, survey, fates, checked, warnings)
        self.warnings += warnings

    def _domains_on_disk(self) -> Iterator[DocumentSet]:
        """Domains of the corpus that the present request does not name: `btm add` must not repeat their documents."""
        named = {source.domain for source in self.sources}
        for domain in prepared_domains(self.output):
            if domain not in named:
                yield load_prepared_documents(self.output / domain)

    def _decide(
        self, source: DomainSource, survey: Survey, others: Sequence[DocumentSet]
    ) -> tuple[np.ndarray, list[str]]:
        data = self.spec.data
        decision = decide_fates(
            self.images.note(source, data, survey),
            others,
            near_duplicate_threshold=data.near_duplicate_threshold,
            **source.split_fractions(data),
        )
        warnings = [survey.fault_summary] if survey.fault_summary else []
        for other, count in decision.shared.items():
            message = f"domains {other} and {source.domain} share {count:,} of {len(survey.sizes):,} documents"
            if data.on_error is OnError.stop and count > _SHARED_LIMIT * len(survey.sizes):
                raise DataError(
                    f"{message} of {source.domain}; remove them from one of the two, or let "
                    f"data.on_error=skip drop them from {source.domain}"
                )
            warnings.append(f"{message}; dropped from {source.domain}")
        return self.images.drop_shared(source.domain, decision.fates, others), warnings

    def _ensure_tokenizer(self) -> None:
        spec = self.spec
        pictured = [source.domain for source in self.sources if isinstance(source, ImageSource)]
        if (self.tokenizer_dir / "tokenizer.json").is_file():
            check_codes(self.tokenizer_dir, pictured)
            return
        source, directory = spec.tokenizer.path or spec.pretrained_dir, self.tokenizer_dir
        if pictured:
            directory = directory.with_name(f".tmp-{directory.name}-text")
        if source:
            copy_tokenizer(source, directory)
        else:
            self.progress.show("training the tokenizer")
            train_tokenizer(self._tokenizer_texts(), directory, vocab_size=spec.tokenizer.vocab_size)
            found = TextEncoder(directory).vocab_size
            if found < spec.tokenizer.vocab_size:
                wanted = spec.tokenizer.vocab_size
                self.warnings.append(f"the text gives a tokenizer of {found:,} entries, not {wanted:,}")
        if pictured:
            self.progress.show("training the image tokenizer")
            fates = {pending.source.domain: pending.fates for pending in self._first_round(pictured)}
            self.progress.say(self.images.add_codes(directory, source, fates, spec.tokenizer, spec.seed))

    def _first_round(self, among: Sequence[str] | None = None) -> list[_Pending]:
        """What a tokenizer is trained on: the domains of the first round, or all where there are none."""
        every = [pending for name, pending in self.pending.items() if among is None or name in among]
        return [pending for pending in every if pending.source.role == "train"] or every

    def _tokenizer_texts(self) -> Iterator[str]:
        """Training documents of the first round's domains, an equal share of bytes of each, chosen by hash."""
        chosen = self._first_round()
        for pending in chosen:
            share = self.spec.tokenizer.train_bytes // len(chosen)
            training = np.flatnonzero(pending.fates == Fate.train)
            order = training[np.argsort(pending.survey.documents.hashes[training], kind="stable")]
            taken = order[: int(np.searchsorted(np.cumsum(pending.survey.sizes[order]), share)) + 1]
            mask = np.zeros(len(pending.fates), dtype=bool)
            mask[taken] = True
            for _, text, _ in surveyed_texts(pending.source, self.spec.data, pending.survey, mask):
                yield plain(text)

    def _encode(self, pending: _Pending, encoder: TextEncoder, digest: str) -> None:
        source, data = pending.source, self.spec.data
        settings = domain_settings(source, data, digest)
        with directory_in_one_step(self.output / source.domain) as temporary:
            splits = encode_domain(
                source,
                data,
                pending.survey,
                pending.fates,
                encoder=self.images.encoder(source.domain, pending.fates, encoder),
                directory=temporary,
                progress=self.progress,
            )
            info = DomainInfo(
                domain=source.domain,
                fingerprint=fingerprint(temporary, settings),
                tokenizer_sha256=digest,
                sources=source.patterns,
                splits=splits,  # pyright: ignore[reportArgumentType]
                exact_duplicates=int((pending.fates == Fate.exact_duplicate).sum()),
                near_duplicates=int((pending.fates == Fate.near_duplicate).sum()),
                broken=pending.survey.broken,
            )
            keep_documents(self.output / _SURVEY_DIR / source.domain, temporary)
            self.images.save(source.domain, temporary)
            record = Provenance(settings, pending.checked_against, pending.warnings)
            write_records(temporary, info, pending.fates, record)
            self.infos[source.domain] = info
            if size_problems(source, info, data.min_train_tokens):
                raise _TooLittleTextError


def prepare(spec: PrepareSpec, progress: ProgressLine | None = None) -> PrepareResult:
    """Prepare every domain of ``spec`` and write ``<output_dir>/prepare.json``.

    The same text and settings give the same bytes, whether or not an earlier preparation was killed on the way.

    Raises:
        DataError: If text, tokenizer or sizes do not allow it; nothing finished is lost.
        ForestError: If another process is preparing the same corpus.
    """
    output = Path(spec.output_dir)
    with exclusive_lock(output / ".lock", wait=False), progress or ProgressLine() as line:
        result = Preparation(spec, line).run()
        result.save(output / "prepare.json")
    return result


def main(arguments: Sequence[str]) -> int:
    """Run the spec file named on the command line; the exit code is that of the error, or 0."""
    try:
        spec = PrepareSpec.load(Path(arguments[0]))
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
        if spec.data.num_workers:
            os.environ["RAYON_NUM_THREADS"] = str(spec.data.num_workers)
        with ProgressLine() as progress:
            result = prepare(spec, progress)
            for info in result.domains.values():
                progress.say(_summary(info))
            for warning in result.warnings:
                progress.say(f"warning: {warning}")
    except BtmError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    except OSError as error:
        if error.errno in _FULL_DISK:
            where = error.filename or "the corpus"
            sys.stderr.write(f"cannot write {where}: {error.strerror}; make room and run again\n")
        else:
            sys.stderr.write(f"{error}\n")
        return 1
    return 0


def _summary(info: DomainInfo) -> str:
    sizes = ", ".join(f"{split} {size.tokens:,}" for split, size in info.splits.items())
    dropped = info.exact_duplicates + info.near_duplicates
    return f"{info.domain}: {sizes} tokens; {dropped:,} duplicates, {sum(info.broken.values()):,} broken left out"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
