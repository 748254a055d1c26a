"""Training batches as a pure function of (seed, update): what is drawn never depends on the world size or on restarts.

Every document of a source comes exactly once per epoch, in an order that is drawn anew for each epoch; short sources
wrap around. Sequences go to the sources in exact proportion to the mixture weights. Nothing is stored between calls
but caches, so resuming needs the number of the update only.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from btm.config_train import Packing
from btm.corpus.mixture import MixtureSchedule
from btm.corpus.packing import BlockReader, DocumentReader
from btm.corpus.randomness import hash_positions, hash_text
from btm.corpus.shards import TokenShard
from btm.errors import DataError
from btm.requests import Part, TokenSource

IGNORED = -100
"""Target that counts for nothing, as in transformers."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Sequences of one update.

    Attributes:
        tokens: Token ids ``(sequences, sequence_length + 1)``, int64; the model reads all but the last column.
        segments: With document packing the number of the document within its row, from 1, int32, of the same shape;
            0 is padding. None with blocks.
        domain_tokens: Domain -> targets that come from it.
        domain: Number of each sequence's domain among the sampler's, int64 ``(sequences,)``; None where nobody asked.
    """

    tokens: np.ndarray
    segments: np.ndarray | None
    domain_tokens: dict[str, int]
    domain: np.ndarray | None = None

    @property
    def inputs(self) -> np.ndarray:
        """Tokens that the model reads, int64 ``(sequences, sequence_length)``."""
        return self.tokens[:, :-1]

    @property
    def input_segments(self) -> np.ndarray | None:
        """Segments of the tokens that the model reads, or None."""
        return None if self.segments is None else self.segments[:, :-1]

    @property
    def num_input_tokens(self) -> int:
        """Tokens that the model reads, without padding."""
        segments = self.input_segments
        return self.inputs.size if segments is None else int((segments > 0).sum())

    def part(self, rows: slice) -> "Batch":
        """Some of the sequences; ``domain_tokens`` stays that of the whole batch."""
        segments, domain = (None if array is None else array[rows] for array in (self.segments, self.domain))
        return Batch(self.tokens[rows], segments, self.domain_tokens, domain)

    def padding(self) -> "Batch":
        """One sequence of nothing but padding."""
        tokens, domain = self.tokens[:1], None if self.domain is None else self.domain[:1]
        return Batch(tokens, np.zeros(tokens.shape, dtype=np.int32), {}, domain)

    @property
    def targets(self) -> np.ndarray:
        """Token that follows each input within its document, else -100; int64 ``(sequences, sequence_length)``."""
        targets = self.tokens[:, 1:]
        if self.segments is None:
            return targets
        same = (self.segments[:, 1:] == self.segments[:, :-1]) & (self.segments[:, 1:] > 0)
        return np.where(same, targets, IGNORED)


class BatchSampler:
    """Draws the batches of one training run from token shards."""

    def __init__(
        self,
        sources: Sequence[TokenSource],
        *,
        sequence_length: int,
        batch_sequences: int,
        packing: Packing | str = Packing.blocks,
        seed: int,
        eos_id: int,
        domains: Sequence[str] | None = None,
        is_balanced: bool = False,
    ) -> None:
        """Open the shards and plan the mixture.

        Args:
            sources: Shards with their weights; those of weight 0 are left out.
            sequence_length: Inputs per sequence.
            batch_sequences: Sequences per update over all processes.
            packing: ``blocks`` or ``documents``.
            seed: Root of the order of documents.
            eos_id: End-of-text token, which stands before every document.
            domains: Names in the order of the numbers in ``Batch.domain``; None takes them as they come.
            is_balanced: Every update has equally many sequences of each source, whatever the weights.

        Raises:
            DataError: If no source has weight, a source has no documents or a domain that is not in ``domains``, or a
                balanced batch does not divide.
        """
        self.sequence_length = sequence_length
        self.batch_sequences = batch_sequences
        self.first_batch = 0
        """Batch of the first update: those before it were read by another run."""
        active = [source for source in sources if source.weight > 0]
        if not active:
            raise DataError("no source of training data has a weight above 0; set data.weights")
        self._domains = [source.domain for source in active]
        self.domains = tuple(dict.fromkeys(self._domains) if domains is None else domains)
        self._domain_ids = _domain_ids(self._domains, self.domains)
        if is_balanced and batch_sequences % len(active):
            raise DataError(
                f"a batch of {batch_sequences} sequences does not divide among {len(active)} domains; make "
                f"train.batch_tokens a multiple of {len(active)} * train.sequence_length"
            )
        # Equal weights give every source its turn once per cycle, so that whole cycles are balanced exactly.
        self._schedule = MixtureSchedule([1.0 if is_balanced else source.weight for source in active])
        reader = BlockReader if Packing(packing) is Packing.blocks else DocumentReader
        self._readers = [
            reader(*open_source(source), key=_source_key(seed, active, index), length=sequence_length, eos_id=eos_id)
            for index, source in enumerate(active)
        ]
        self._has_segments = Packing(packing) is Packing.documents

    def batch(self, update: int) -> Batch:
        """All sequences of update ``update`` (from 0); the same bits for the same seed and update, always."""
        begin = (self.first_batch + update) * self.batch_sequences
        source, rank = self._schedule.draw(begin, self.batch_sequences)
        shape = (self.batch_sequences, self.sequence_length + 1)
        tokens = np.empty(shape, dtype=np.int64)
        segments = np.empty(shape, dtype=np.int32) if self._has_segments else None
        domain_tokens = dict.fromkeys(self._domains, 0)
        for index in np.unique(source):
            rows = np.flatnonzero(source == index)
            drawn = self._readers[index].read(rank[rows])
            tokens[rows] = drawn.tokens
            if segments is not None:
                segments[rows] = drawn.segments
            domain_tokens[self._domains[index]] += drawn.num_targets
        return Batch(tokens, segments, domain_tokens, self._domain_ids[source])

    @staticmethod
    def rows(batch: Batch, rank: int, world: int) -> Batch:
        """The contiguous rows of process ``rank`` among ``world``; ``domain_tokens`` stays that of the whole batch."""
        count = len(batch.tokens)
        return batch.part(slice(rank * count // world, (rank + 1) * count // world))


def open_source(source: TokenSource) -> tuple[TokenShard, np.ndarray]:
    """Open the shard of ``source`` and name its documents.

    Returns:
        The shard and the indices of the documents that belong to the source's part, int64, ascending.

    Raises:
        DataError: If the shard cannot be read, or no document is left.
    """
    shard = TokenShard(source.prefix)
    documents = part_documents(shard.num_documents, source.domain, source.part)
    documents = documents[shard.lengths[documents] > 0]
    if not len(documents):
        where = f" in part {source.part.index} of {source.part.count}" if source.part else ""
        raise DataError(f"{source.prefix} has no documents{where}; give domain {source.domain!r} more text")
    return shard, documents


def part_documents(num_documents: int, domain: str, part: Part | None) -> np.ndarray:
    """Indices of the documents in one random part; the parts of a domain are disjoint and cover it, whatever the seed.

    Raises:
        DataError: If the part does not exist.
    """
    documents = np.arange(num_documents, dtype=np.int64)
    if part is None:
        return documents
    if part.index >= part.count:
        raise DataError(f"part {part.index} of {part.count} does not exist; parts are numbered from 0")
    draws = hash_positions(hash_text("part", domain), documents)
    return documents[draws % np.uint64(part.count) == np.uint64(part.index)]


def _domain_ids(of_sources: Sequence[str], domains: Sequence[str]) -> np.ndarray:
    unknown = sorted(set(of_sources) - set(domains))
    if unknown:
        raise DataError(f"domain {unknown[0]!r} is not among those of the model: {', '.join(domains)}")
    return np.array([domains.index(name) for name in of_sources], dtype=np.int64)


def _source_key(seed: int, sources: Sequence[TokenSource], index: int) -> int:
    """Key of a source's random choices, independent of the other domains."""
    domain = sources[index].domain
    repetition = sum(source.domain == domain for source in sources[:index])
    return hash_text("order", str(seed), domain, str(repetition))
