"""Dev loss of a model directory: the judge of a greedy soup."""

import tempfile
from collections.abc import Callable
from pathlib import Path

from btm.errors import MergeError
from btm.merge.model_files import CONFIG_NAME, read_json_object
from btm.records import MergeSpec, ScoreSpec

_POSITION_KEYS = ("max_position_embeddings", "n_positions")


def dev_judge(spec: MergeSpec) -> Callable[[Path], float] | None:
    """A function from a model directory to its mean loss (nats per token) on ``spec.dev``; None without dev split.

    torch is imported when the function is first called.

    Raises:
        MergeError: If the dev split of another domain than the target is given.
    """
    dev = spec.dev
    if dev is None:
        return None
    if spec.domain is not None and dev.key != f"dev-{spec.domain}":
        raise MergeError(f"the dev split {dev.key} is not of the target domain {spec.domain}; give dev-{spec.domain}")

    def judge(directory: Path) -> float:
        from btm.evaluate.score import load_scores, score

        with tempfile.TemporaryDirectory(prefix="btm-judge-") as scratch:
            score(
                ScoreSpec(
                    name="judge",
                    model_dir=str(directory),
                    model_sha256="",
                    sources=[dev],
                    output_dir=scratch,
                    sequence_length=min(spec.sequence_length, _positions(directory)),
                    batch_sequences=spec.batch_sequences,
                )
            )
            return -float(load_scores(scratch, dev.key).logp.mean(dtype="float64"))

    return judge


def _positions(directory: Path) -> int:
    config = read_json_object(directory / CONFIG_NAME)
    return next((int(config[key]) for key in _POSITION_KEYS if key in config), 1 << 30)
