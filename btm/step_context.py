"""What building a request needs to know: the configuration, the forest's layout, the budget."""

from dataclasses import dataclass, field
from pathlib import Path

from btm.budget import Updates
from btm.config import Config
from btm.forest import Forest
from btm.records import PICTURES_FILE, DomainInfo


@dataclass(frozen=True, kw_only=True, slots=True)
class Context:
    """What building a spec needs to know."""

    config: Config
    forest_dir: Path
    updates: Updates
    domains: list[str]
    """Domains that the seed and dense models train on."""
    novel: list[str] = field(default_factory=list)
    evaluation_name: str = "evaluation.json"

    @property
    def evaluated(self) -> list[str]:
        """Domains that are evaluated."""
        return [*self.domains, *self.novel]

    def run_dir(self, name: str) -> Path:
        """Directory of a step."""
        return self.forest_dir / "runs" / name

    def log(self, name: str) -> Path:
        """Output of all attempts at a step, one after the other."""
        return self.run_dir(name) / "log.txt"

    def checkpoints(self, name: str) -> frozenset[str]:
        """Names of the training checkpoints of a step."""
        return frozenset(path.name for path in (self.run_dir(name) / "checkpoints").glob("step-*"))

    def corpus(self, domain: str, split: str) -> str:
        """Prefix of a token shard."""
        return str(self.forest_dir / "corpus" / domain / split)

    def has_pictures(self, domain: str) -> bool:
        """Whether documents of a prepared domain hold pictures."""
        return (self.forest_dir / "corpus" / domain / PICTURES_FILE).is_file()

    def forest(self) -> Forest:
        """The forest as it is now."""
        return Forest.open(self.forest_dir)

    def domain_info(self, domain: str) -> DomainInfo:
        """Record of a prepared domain."""
        return DomainInfo.load(self.forest_dir / "corpus" / domain / "corpus.json")
