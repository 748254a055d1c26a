"""The text of one domain, whatever it comes from, and what would make it another text."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from btm.config_data import DataConfig
from btm.corpus.faults import Faults
from btm.corpus.files_of_domain import find_files
from btm.corpus.readers import Document, read_documents
from btm.errors import DataError
from btm.files import name_problem

Role = Literal["train", "novel", "later"]


@dataclass(frozen=True, slots=True)
class DomainSource:
    """Where the documents of a domain are.

    Attributes:
        domain: Its name.
        role: ``train``: an ELM of the first round; ``novel``: evaluated only; ``later``: an ELM that joins later.
        patterns: What the configuration says.
        files: Files and dataset directories; none for text of this installation.
        local: Gives the documents of text of this installation, or None.
        local_identity: What that text depends on.
    """

    domain: str
    role: Role
    patterns: list[str]
    files: list[Path]
    local: Callable[[], Iterator[str]] | None = None
    local_identity: str = ""

    @property
    def identity(self) -> list[list[Any]]:
        """Path, size and modification time (ns) of every file below; changes when the text may have changed."""
        if self.local is not None:
            return [[self.local_identity, 0, 0]]
        below = [
            inner
            for file in self.files
            for inner in (sorted(path for path in file.rglob("*") if path.is_file()) if file.is_dir() else [file])
        ]
        return [[str(path), path.stat().st_size, path.stat().st_mtime_ns] for path in below]

    def split_fractions(self, data: DataConfig) -> dict[str, float]:
        """Fractions of this domain; nobody trains on a novel one: all of it is held out."""
        if self.role != "novel":
            return {"dev_fraction": data.dev_fraction, "test_fraction": data.test_fraction}
        test_fraction = data.test_fraction / (data.test_fraction + data.dev_fraction)
        return {"dev_fraction": 1 - test_fraction, "test_fraction": test_fraction}

    def documents(self, data: DataConfig, faults: Faults) -> Iterator[Document]:
        """The domain's sound documents in order, ``data.max_documents`` at most."""
        if self.local is not None:
            found = (Document(text, Path(self.domain), line) for line, text in enumerate(self.local(), start=1))
        else:
            found = read_documents(self.files, text_field=data.text_field, faults=faults)
        return islice(found, data.max_documents)


def find_sources(data: DataConfig) -> list[DomainSource]:
    """Sources of all domains: those of the first round, then novel ones, then those that join later.

    Raises:
        DataError: If names are unfit or used twice, or paths match nothing; all problems together.
    """
    groups: list[tuple[Role, dict[str, str | list[str]]]] = [
        ("train", data.domains),
        ("novel", data.novel),
        ("later", data.add_later),
    ]
    sources = _local_sources(data) if data.local_text else []
    problems: list[str] = []
    for role, group in groups:
        for domain, given in group.items():
            patterns = [given] if isinstance(given, str) else list(given)
            try:
                if problem := name_problem(domain):
                    raise DataError(problem)
                if domain.lower() in {source.domain.lower() for source in sources}:
                    raise DataError(f"domain {domain} is named twice (upper and lower case count as one); rename one")
                sources.append(DomainSource(domain, role, patterns, find_files(domain, patterns)))
            except (DataError, OSError) as error:
                problems.append(str(error))
    if problems:
        raise DataError("\n".join(problems))
    if not sources:
        raise DataError("no domain is given; set data.domains.<name>=<path>")
    order = {"train": 0, "novel": 1, "later": 2}
    return sorted(sources, key=lambda source: order[source.role])


def _local_sources(data: DataConfig) -> list[DomainSource]:
    from btm.corpus.local_text import HELD_BACK, environment_identity, local_domains

    identity = environment_identity()
    given = {*data.domains, *data.novel, *data.add_later}
    return [
        DomainSource(name, "later" if name == HELD_BACK else "train", [f"local text: {name}"], [], factory, identity)
        for name, factory in local_domains().items()
        if name not in given
    ]


def describe_change(old: Sequence[Sequence[Any]], new: Sequence[Sequence[Any]]) -> str:
    """What differs between two identities, in words that name the first file."""
    before = {str(entry[0]): tuple(entry[1:]) for entry in old}
    after = {str(entry[0]): tuple(entry[1:]) for entry in new}
    for path in [*before, *after]:
        if path not in after:
            return f"{path} is gone"
        if path not in before:
            return f"{path} is new"
        if before[path] != after[path]:
            sizes = f"{before[path][0]} bytes before, {after[path][0]} now"
            return f"{path} has changed ({sizes if before[path][0] != after[path][0] else 'newer'})"
    return "the order of files has changed"
