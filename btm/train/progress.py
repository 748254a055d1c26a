"""How far a run has come: all that a checkpoint holds beside tensors, and which request it may continue."""

from collections.abc import Iterator
from typing import Any

from btm.records import StoredModel
from btm.requests import TrainSpec
from btm.schema import Model
from btm.train.expert_passes import routes_by_token
from btm.train.spikes import SpikeState

_FREE_KEYS = (
    "root",
    "output_dir",
    "tokenizer_dir",
    "start.path",
    "train.activation_checkpointing",
    "train.keep_checkpoints",
    "train.checkpoint_every",
    "train.max_bad_steps",
    "train.spike_factor",
    "train.micro_batch_sequences",
    "engine.expert_parallel",
    "engine.name",
    "engine.num_processes",
    "engine.offload",
    "engine.sequence_parallel",
    "engine.tensor_parallel",
    "engine.zero_stage",
)
"""What may differ between a checkpoint and the request that continues it: where files lie, how a run is cut into files,
passes and processes, and who runs it. None of it changes what is learnt beyond rounding."""
_FREE_TABLE = "engine.deepspeed"
_PASSES_KEY = "train.micro_batch_sequences"
"""Of these, what decides which tokens meet in one pass; processes that continue a run keep its passes."""


class MetricWindow(Model):
    """Sums since the last metrics row."""

    loss_sum: float = 0.0
    num_losses: int = 0
    tokens: int = 0
    seconds: float = 0.0


class Progress(Model):
    """State of the training loop after ``update``."""

    update: int
    tokens: int = 0
    """Trained on by this run: sequences times their length, skipped updates included."""
    seconds: float = 0.0
    """Wall-clock of this run's updates. Work that a kill undid is not in it."""
    num_optimizer_steps: int = 0
    spikes: SpikeState = SpikeState()
    window: MetricWindow = MetricWindow()
    realised_tokens: dict[str, int] = {}
    final_loss: float | None = None
    """Of the last metrics row that had a good update."""
    dev_loss: dict[str, float] = {}
    dev_update: int = -1
    """Update of ``dev_loss``."""
    matmul_peak: float = 0.0
    """FLOP/s, measured once per run."""
    passes: list[int] = []
    """Sequences of each pass of an update, where a run must keep them."""


class CheckpointState(StoredModel):
    """``state.json`` of a checkpoint. Random numbers need no state: they follow from seed and update."""

    schema_version: int = 1
    spec: dict[str, Any]
    tokenizer_sha256: str
    progress: Progress


def differences(stored: dict[str, Any], spec: TrainSpec) -> list[str]:
    """What makes ``spec`` another training than the one whose request is ``stored``; one line each."""
    asked = dict(_leaves(spec.model_dump(mode="json", by_alias=True)))
    before = dict(_leaves(stored))
    return [
        f"{key}: {before.get(key, 'absent')!r} before, {asked.get(key, 'absent')!r} now"
        for key in sorted(asked.keys() | before.keys())
        if not _is_free(key, spec) and asked.get(key) != before.get(key)
    ]


def _is_free(key: str, spec: TrainSpec) -> bool:
    if key == _PASSES_KEY and not routes_by_token(spec.ffn):
        return False
    return key in _FREE_KEYS or key.endswith(".prefix") or key.startswith(_FREE_TABLE)


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    children: Any = ()
    if isinstance(value, dict):
        children = value.items()
    elif isinstance(value, list):
        children = enumerate(value)
    if not children:
        yield path, value
    for key, child in children:
        yield from _leaves(child, f"{path}.{key}" if path else str(key))
