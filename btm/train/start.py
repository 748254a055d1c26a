"""From a request to a run that is ready to train: model, data, and the state that is continued."""

import logging
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from pydantic import ValidationError

from btm.config_ffn import FfnConfig, FfnLayer
from btm.config_model import EngineName
from btm.corpus.images.vocabulary import modality_starts
from btm.corpus.sampler import BatchSampler
from btm.corpus.shards import TokenShard
from btm.corpus.token_classes import token_classes
from btm.corpus.tokenizer import TextEncoder, tokenizer_sha256
from btm.corpus.windows import Windows, document_windows
from btm.errors import CheckpointError, DataError
from btm.files import read_json
from btm.model.causal_lm import build_model, load_model
from btm.model.demix import freeze_except
from btm.model.learning_routers import freeze_except_auxiliary, route_as_in_training
from btm.model.sparse_lm import add_experts, describe, sparsity_of
from btm.requests import TrainSpec
from btm.train.checkpoint import Checkpoint, CheckpointStore, verified
from btm.train.engine import Engine
from btm.train.expert_passes import keeps_passes, passes_of
from btm.train.expert_training import LOSS_WEIGHTS
from btm.train.metrics import MetricsFile
from btm.train.progress import CheckpointState, Progress, differences
from btm.train.ranks import Ranks
from btm.train.torch_engine import TorchEngine
from btm.train.trainer import Run, Trainer
from btm.train.upcycling import report_jump, upcycled_model

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import PreTrainedModel

_CHECKPOINTS = "checkpoints"
_NONE = -1

logger = logging.getLogger(__name__)


def prepare_trainer(spec: TrainSpec, ranks: Ranks, stop_requested: "Callable[[], bool]") -> Trainer:
    """Build everything that training ``spec`` needs, continued from the newest undamaged checkpoint of the run.

    Raises:
        CheckpointError: If the run directory holds another training, or the parent has no fitting checkpoint.
        DataError: If shards or tokenizer cannot be read.
    """
    output = Path(spec.output_dir)
    tokenizer = TextEncoder(spec.tokenizer_dir)
    eos_id, vocab_size = tokenizer.eos_id, tokenizer.vocab_size
    sha256 = tokenizer_sha256(Path(spec.tokenizer_dir))
    model = _initial_model(spec, vocab_size, eos_id)
    sampler = _make_sampler(spec, model, eos_id)
    store = CheckpointStore(output / _CHECKPOINTS, keep=spec.train.keep_checkpoints)
    own = _own_checkpoint(store, spec, sha256, ranks)
    passes = _passes(model, spec, ranks, own)
    engine = _engine_of(model, spec, ranks, passes)
    if own is not None:
        progress = _load(engine, own)
    elif spec.start.kind == "checkpoint":
        progress = _branch(engine, spec, sha256)
    else:
        progress = Progress(update=spec.first_update)
    progress = progress.model_copy(update={"passes": passes or []})
    if not progress.matmul_peak:
        progress = progress.model_copy(update={"matmul_peak": engine.matmul_peak()})
    last_row = _NONE if own is None else progress.update
    metrics = MetricsFile(output / "metrics.jsonl", last_update=last_row) if ranks.is_main else None
    dev = _dev_windows(spec, eos_id)
    run = Run(spec=spec, engine=engine, sampler=sampler, dev=dev, store=store, metrics=metrics, tokenizer_sha256=sha256)
    trainer = Trainer(run, progress, stop_requested)
    if own is not None:
        trainer.mark_saved()
    elif spec.start.kind == "upcycle":
        report_jump(spec, engine, model, dev, metrics)
    return trainer


def _engine_of(model: "PreTrainedModel", spec: TrainSpec, ranks: Ranks, passes: list[int] | None) -> Engine:
    kind = TorchEngine
    if _engine_name(model, spec) is EngineName.megatron:
        from btm.train.megatron_engine import MegatronEngine

        kind = MegatronEngine
    elif _engine_name(model, spec) is EngineName.deepspeed:
        from btm.train.deepspeed_engine import DeepSpeedEngine

        kind = DeepSpeedEngine
    classes = torch.from_numpy(token_classes(spec.tokenizer_dir)) if sparsity_of(model) else None
    return kind(model, train=spec.train, config=spec.engine, ranks=ranks, passes=passes, token_classes=classes)


def _engine_name(model: "PreTrainedModel", spec: TrainSpec) -> EngineName:
    """The others train all weights; where most are frozen, there is little state to share out."""
    is_whole = all(weight.requires_grad for weight in model.parameters())
    return spec.engine.name if is_whole else EngineName.torch


def _passes(model: "PreTrainedModel", spec: TrainSpec, ranks: Ranks, own: Checkpoint | None) -> list[int] | None:
    """Sequences of each pass, where they are part of what is learnt: those that the run began with; else None."""
    if not keeps_passes(spec.ffn):
        return None
    # Processes that share out layers see the same sequences.
    sharing = spec.engine.tensor_parallel if _engine_name(model, spec) is EngineName.megatron else 1
    num_groups = ranks.size // sharing
    asked = passes_of(spec.batch_sequences, num_groups, spec.train.micro_batch_sequences)
    passes = asked if own is None else _state(own).progress.passes or asked
    if ranks.is_main and len(passes) < num_groups <= spec.batch_sequences:
        logger.warning(
            "this run has %d forward passes per update, which %d processes cannot share equally; a new run has smaller "
            "ones with train.micro_batch_sequences=%d",
            len(passes),
            num_groups,
            spec.batch_sequences // num_groups,
        )
    return passes


def check_output(spec: TrainSpec, ranks: Ranks) -> None:
    """Refuse a run directory that holds the finished result of another request.

    Raises:
        CheckpointError: If it does.
    """
    path = Path(spec.output_dir) / "result.json"
    if ranks.is_main and path.exists():
        raise CheckpointError(
            f"{path} is the result of another request (spec {str(read_json(path).get('spec_sha256'))[:12]}, asked is "
            f"{spec.sha256[:12]}); give another output directory, or remove this one to train anew"
        )


def _own_checkpoint(store: CheckpointStore, spec: TrainSpec, sha256: str, ranks: Ranks) -> Checkpoint | None:
    """The checkpoint to continue, chosen and checked by the main rank for all."""
    checkpoint = None
    if ranks.is_main:
        store.clean()
        checkpoint = store.newest(set_aside=True)
        if checkpoint is not None:
            _check_same_training(checkpoint, spec, sha256)
            logger.info("continuing from %s", checkpoint.path)
    update = ranks.from_main(_NONE if checkpoint is None else checkpoint.update)
    if update == _NONE or checkpoint is not None:
        return checkpoint
    return _verified_again(store, update)


def _verified_again(store: CheckpointStore, update: int) -> Checkpoint:
    path = store.path(update)
    checkpoint = verified(path, update)
    if isinstance(checkpoint, str):
        raise CheckpointError(f"{path} is damaged on this process: {checkpoint}; run again to use the one before it")
    return checkpoint


def _check_same_training(checkpoint: Checkpoint, spec: TrainSpec, sha256: str) -> None:
    state = _state(checkpoint)
    lines = differences(state.spec, spec)
    if state.tokenizer_sha256 != sha256:
        lines.append(f"tokenizer: {state.tokenizer_sha256[:12]} before, {sha256[:12]} now")
    if lines:
        raise CheckpointError(
            f"{checkpoint.path} belongs to another training: {'; '.join(lines)}; ask for the same training again, "
            f"give another output directory, or remove {spec.output_dir} to train anew"
        )


def _state(checkpoint: Checkpoint) -> CheckpointState:
    try:
        return CheckpointState.model_validate_json(checkpoint.state)
    except ValidationError as error:
        raise CheckpointError(
            f"{checkpoint.path} was written by another version of this program ({error.errors()[0]['msg']}); use that "
            f"version, or train anew"
        ) from None


def _load(engine: Engine, checkpoint: Checkpoint) -> Progress:
    progress = _state(checkpoint).progress
    for name, tensors in engine.tensor_files().items():
        checkpoint.load(name, tensors)
    engine.tensors_loaded(progress.num_optimizer_steps)
    return progress


def _branch(engine: Engine, spec: TrainSpec, sha256: str) -> Progress:
    """Continue weights, optimizer and schedule of another run; data, counts and history are this run's own."""
    parent = Path(spec.start.path or "")
    checkpoint = CheckpointStore(parent / _CHECKPOINTS).newest(set_aside=False)
    if checkpoint is None:
        raise CheckpointError(
            f"{parent} has no undamaged checkpoint to branch from; remove its result.json and train it again"
        )
    state = _state(checkpoint)
    if checkpoint.update != spec.first_update:
        raise CheckpointError(
            f"the newest undamaged checkpoint of {parent} is of update {checkpoint.update}, the branch begins at "
            f"{spec.first_update}; remove {parent / 'result.json'} and run again: that training continues from there"
        )
    if state.tokenizer_sha256 != sha256:
        raise CheckpointError(f"{checkpoint.path} was trained with another tokenizer than {spec.tokenizer_dir}")
    loaded = _load(engine, checkpoint)
    logger.info("branching from %s", checkpoint.path)
    return Progress(update=spec.first_update, num_optimizer_steps=loaded.num_optimizer_steps)


def _make_sampler(spec: TrainSpec, model: "PreTrainedModel", eos_id: int) -> BatchSampler:
    sparsity = sparsity_of(model)
    is_demix = sparsity is not None and sparsity.ffn.layer is FfnLayer.demix
    sampler = BatchSampler(
        spec.sources,
        sequence_length=spec.train.sequence_length,
        batch_sequences=spec.batch_sequences,
        packing=spec.train.packing,
        seed=spec.seed,
        eos_id=eos_id,
        domains=sparsity.domains if sparsity is not None and sparsity.domains else None,
        is_balanced=is_demix,
    )
    sampler.first_batch = spec.first_batch
    return sampler


def _initial_model(spec: TrainSpec, vocab_size: int, eos_id: int) -> "PreTrainedModel":
    directory = spec.start.path if spec.start.kind == "weights" else spec.model.path
    if spec.start.kind == "upcycle":
        model = upcycled_model(spec, vocab_size)
    elif directory:
        model = load_model(directory, vocab_size=vocab_size)
    else:
        model = build_model(spec.model, vocab_size=vocab_size, eos_id=eos_id, seed=spec.seed)
    sparsity = sparsity_of(model)
    if sparsity is None:
        domains = list(dict.fromkeys(source.domain for source in spec.sources))
        add_experts(model, _with_modalities(spec), domains, seed=spec.seed, is_pretrained=bool(directory))
    elif spec.ffn.is_sparse:
        if spec.ffn.layer is not sparsity.ffn.layer:
            raise CheckpointError(
                f"{directory} has expert layers of ffn={sparsity.ffn.layer}, asked is ffn={spec.ffn.layer}; ask for "
                f"the same, or start from a dense model"
            )
        weights = {name: getattr(spec.ffn, name) for name in LOSS_WEIGHTS}
        describe(model, sparsity.ffn.model_copy(update=weights), sparsity.domains)
    if spec.trainable_domain is not None:
        freeze_except(model, spec.trainable_domain)
    if spec.trains_auxiliary_only and not freeze_except_auxiliary(model):
        raise CheckpointError(f"{directory or spec.ffn.layer} has no auxiliary routers; train a model of ffn=modality")
    if not spec.ffn.auxiliary_weight:
        route_as_in_training(model)
    return model


def _with_modalities(spec: TrainSpec) -> FfnConfig:
    """The expert layers asked for, with the ids at which modalities begin."""
    ffn = spec.ffn
    if ffn.layer is not FfnLayer.modality or ffn.modality_starts or len(ffn.group_sizes) == 1:
        return ffn
    starts = list(modality_starts(spec.tokenizer_dir))
    if len(starts) != len(ffn.group_sizes) - 1:
        raise DataError(
            f"{spec.tokenizer_dir} has {len(starts) + 1} modalities, ffn.group_sizes={ffn.group_sizes} asks for "
            f"{len(ffn.group_sizes)}; train on pictures (data.images), or give ffn.modality_starts"
        )
    return ffn.model_copy(update={"modality_starts": starts})


def _dev_windows(spec: TrainSpec, eos_id: int) -> dict[str, Windows]:
    return {
        source.domain: document_windows(
            TokenShard(source.prefix),
            sequence_length=spec.train.sequence_length,
            eos_id=eos_id,
            max_tokens=spec.train.eval_tokens,
        )
        for source in spec.dev
    }
