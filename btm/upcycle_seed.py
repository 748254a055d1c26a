"""The trained model with one expert per modality that a sparse run is upcycled from (``ffn.upcycle_from``)."""

from dataclasses import dataclass
from pathlib import Path

from btm.errors import ForestError
from btm.files import sha256_of_file
from btm.records import Ledger, TrainResult
from btm.requests import TokenSource, TrainSpec

_MODEL, _RUN = "model", Path("runs/sparse")
_WEIGHTS = "model.safetensors"


@dataclass(frozen=True, slots=True)
class UpcycleSeed:
    """Where the seed lies and what is known of its training."""

    directory: Path
    """Of the model."""
    spec: TrainSpec | None = None
    result: TrainResult | None = None

    @classmethod
    def find(cls, path: Path | str) -> "UpcycleSeed":
        """The seed at ``path``: a forest with a sparse model, or the directory of one.

        Raises:
            ForestError: If there is none.
        """
        given = Path(path)
        model = given / _RUN / _MODEL if (given / _RUN).is_dir() else given
        if not (model / _WEIGHTS).is_file():
            raise ForestError(
                f"ffn.upcycle_from={path} holds no finished sparse model ({model / _WEIGHTS} is missing); give the "
                "forest of a run with ffn=modality ffn.group_sizes=[1,1], or the directory of its model"
            )
        spec, result = model.parent / "spec.json", model.parent / "result.json"
        if not spec.is_file() or not result.is_file():
            return cls(model)
        return cls(model, TrainSpec.load(spec), TrainResult.load(result))

    @property
    def sha256(self) -> str:
        """Hash of what made it, or of its weights where nobody knows."""
        return sha256_of_file(self.directory / _WEIGHTS) if self.result is None else self.result.spec_sha256

    @property
    def ledger(self) -> Ledger:
        """What it cost; nothing where nobody knows."""
        return Ledger() if self.result is None else self.result.ledger

    def batches_read(self, sources: list[TokenSource], tokens_per_update: int) -> int:
        """How many updates of ``tokens_per_update`` read as much as the seed did, if it read the same documents."""
        if self.spec is None or [s.fingerprint for s in self.spec.sources] != [s.fingerprint for s in sources]:
            return 0
        return self.ledger.tokens // tokens_per_update
