"""What a prepared domain must hold to be trained on and evaluated."""

from collections.abc import Sequence

from btm.corpus.sources import DomainSource
from btm.errors import DataError
from btm.records import DomainInfo


def check_sizes(sources: Sequence[DomainSource], infos: dict[str, DomainInfo], min_train_tokens: int) -> None:
    """Refuse domains with too little text, all together.

    Raises:
        DataError: If there are any.
    """
    problems = [line for source in sources for line in size_problems(source, infos[source.domain], min_train_tokens)]
    if problems:
        raise DataError("\n".join(problems))


def size_problems(source: DomainSource, info: DomainInfo, min_train_tokens: int) -> list[str]:
    """Say what a prepared domain has too little of; empty when it can be trained on and evaluated."""
    problems, splits = [], info.splits
    if source.role != "novel" and splits["train"].tokens < min_train_tokens:
        problems.append(
            f"domain {source.domain} has {splits['train'].tokens:,} training tokens, needs at least "
            f"{min_train_tokens:,}; give it more text, or lower data.min_train_tokens"
        )
    problems += [
        f"domain {source.domain} has no {split} documents among {sum(s.documents for s in splits.values()):,}; "
        f"give it more and shorter documents, or raise data.{split}_fraction"
        for split in ("dev", "test")
        if not splits[split].documents
    ]
    return problems
