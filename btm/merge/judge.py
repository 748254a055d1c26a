"""Dev loss of a model directory: the judge of a greedy soup."""

from collections.abc import Callable
from pathlib import Path

from btm.errors import MergeError
from btm.merge.model_files import CONFIG_NAME, read_json_object
from btm.requests import MergeSpec, ScoreSource

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

    return lambda directory: _mean_loss(directory, spec, dev)


def _mean_loss(directory: Path, spec: MergeSpec, dev: ScoreSource) -> float:
    import torch

    from btm.corpus.shards import TokenShard
    from btm.corpus.windows import document_windows
    from btm.model.causal_lm import load_model
    from btm.model.loss import token_losses

    shard = TokenShard(dev.prefix)
    windows = document_windows(
        shard,
        sequence_length=min(spec.sequence_length, _positions(directory)),
        eos_id=int(shard.document(0)[-1]),
        max_tokens=dev.max_tokens,
        max_documents=dev.max_documents,
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load_model(directory, torch.bfloat16).to(device)  # pyright: ignore[reportArgumentType]
    total = 0.0
    for begin in range(0, len(windows.inputs), spec.batch_sequences):
        rows = slice(begin, begin + spec.batch_sequences)
        inputs, targets = (torch.from_numpy(part[rows]).to(device) for part in (windows.inputs, windows.targets))
        total += float(token_losses(model, inputs, targets).double().sum())
    return total / len(windows.token_ids)


def _positions(directory: Path) -> int:
    config = read_json_object(directory / CONFIG_NAME)
    return next((int(config[key]) for key in _POSITION_KEYS if key in config), 1 << 30)
