"""Score splits under one model: ``python -m btm.evaluate.score spec.json`` runs a :class:`btm.requests.ScoreSpec`.

Each split becomes ``<key>.npz`` with the log-probability of every token. A file that already answers the same request
(same weights, documents, windows and arithmetic) is kept, so a new domain costs only the splits of that domain.
"""

import io
import sys
import time
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from btm.errors import DataError, ForestError
from btm.files import sha256_of_json, write_atomic
from btm.model.allocator import tune_allocator
from btm.records import StepResult
from btm.requests import ScoreSource, ScoreSpec

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Scores(NamedTuple):
    """Scored documents of one split."""

    logp: np.ndarray
    """Log-probability of each token in nats, float32: ``(tokens,)``, documents one after the other."""
    document_starts: np.ndarray
    """First token of each document and the end of the last: int64 ``(documents + 1,)``."""
    document_bytes: np.ndarray
    """UTF-8 bytes of each document's text: int64 ``(documents,)``."""

    @property
    def num_documents(self) -> int:
        """Documents scored."""
        return len(self.document_bytes)

    def document(self, index: int) -> np.ndarray:
        """Log-probabilities of one document's tokens."""
        return self.logp[self.document_starts[index] : self.document_starts[index + 1]]


def score(spec: ScoreSpec) -> StepResult:
    """Score every split of ``spec`` that is not scored yet, and write ``result.json``.

    Raises:
        BtmError: If the model or a shard cannot be read.
    """
    began = time.monotonic()
    output = Path(spec.output_dir)
    missing = [source for source in spec.sources if not _is_scored(spec, source)]
    if missing:
        model = _load(spec)
        for source in missing:
            _score_split(model, spec, source)
    result = StepResult(spec_sha256=spec.sha256, seconds=time.monotonic() - began)
    result.save(output / "result.json")
    return result


def load_scores(directory: Path | str, key: str) -> Scores:
    """Read ``<key>.npz``.

    Raises:
        ForestError: If it is missing or damaged.
    """
    return _read(Path(directory) / f"{key}.npz")[0]


def save_scores(path: Path, scores: Scores, request: str) -> None:
    """Write a score file in one step, without pickle; ``request`` is the hash of what it answers."""
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, request=np.array(request), **scores._asdict())
    write_atomic(path, buffer.getvalue())


def _is_scored(spec: ScoreSpec, source: ScoreSource) -> bool:
    try:
        return _read(_path(spec, source))[1] == _request(spec, source)
    except ForestError:
        return False


def _request(spec: ScoreSpec, source: ScoreSource) -> str:
    """Hash of all that shapes the numbers; paths do not."""
    shaping = spec.model_dump(mode="json", include={"model_sha256", "sequence_length", "batch_sequences", "dtype"})
    if spec.routing != "causal":
        shaping |= {"routing": spec.routing, "pass_tokens": spec.pass_tokens}
    return sha256_of_json([shaping, source.model_dump(mode="json", exclude={"prefix"})])


def _path(spec: ScoreSpec, source: ScoreSource) -> Path:
    return Path(spec.output_dir) / f"{source.key}.npz"


def _load(spec: ScoreSpec) -> "PreTrainedModel":
    import torch

    from btm.model.causal_lm import load_model
    from btm.model.learning_routers import route_as_in_training

    dtype = torch.bfloat16 if spec.dtype == "bf16" else torch.float32
    model = load_model(spec.model_dir, dtype, domain=spec.expert)
    if spec.routing == "training":
        route_as_in_training(model)
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()  # pyright: ignore[reportArgumentType]


def _score_split(model: "PreTrainedModel", spec: ScoreSpec, source: ScoreSource) -> None:
    from btm.corpus.shards import TokenShard
    from btm.corpus.windows import document_windows
    from btm.ensemble.likelihood import token_log_likelihoods

    shard = TokenShard(source.prefix)
    if not shard.num_documents:
        raise DataError(f"{source.prefix} has no documents to score; give the domain more text or a larger split")
    windows = document_windows(
        shard,
        sequence_length=spec.sequence_length,
        # Every document ends in it; an imported model's config may name another token, or none.
        eos_id=int(shard.document(0)[-1]),
        max_tokens=source.max_tokens,
        max_documents=source.max_documents,
    )
    logp = token_log_likelihoods(model, windows, batch_sequences=spec.batch_sequences, pass_tokens=spec.pass_tokens)
    scores = Scores(logp, windows.document_starts, windows.document_bytes)
    save_scores(_path(spec, source), scores, _request(spec, source))


def _read(path: Path) -> tuple[Scores, str]:
    try:
        with np.load(path, allow_pickle=False) as file:
            scores = Scores(file["logp"], file["document_starts"], file["document_bytes"])
            request = str(file["request"])
    except FileNotFoundError:
        raise ForestError(f"{path} does not exist; `btm evaluate` scores what is missing") from None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise ForestError(f"{path} is damaged ({error}); delete it and run `btm evaluate` again") from None
    starts = scores.document_starts
    if len(starts) != scores.num_documents + 1 or starts[0] != 0 or starts[-1] != len(scores.logp):
        raise ForestError(f"{path} is damaged (its documents and tokens disagree); delete it and run `btm evaluate`")
    if bool(np.isnan(scores.logp).any()):
        raise ForestError(f"{path} holds NaN: the model is damaged; leave it out or train it again")
    return scores, request


def main(arguments: Sequence[str]) -> None:
    """Run the spec file named on the command line."""
    tune_allocator()
    score(ScoreSpec.load(Path(arguments[0])))


if __name__ == "__main__":
    main(sys.argv[1:])
