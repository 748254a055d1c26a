"""Train one model: ``python -m btm.train.worker spec.json`` runs a :class:`btm.requests.TrainSpec`.

One process, or several with ``RANK``, ``WORLD_SIZE`` and ``RENDEZVOUS_FILE`` set by the launcher. Killed at any moment
and started again, it continues from its newest undamaged checkpoint and ends with the same bits.

Exit codes: 0 done (also when it was done before); 1 an error that the user has to repair, said in the last line of the
log; 75 another process of the group is gone, start all of them again; 143 stopped on request: TERM or USR2 lets the
running update end, writes a checkpoint on the main rank and leaves, so that the next start loses nothing.
"""

import contextlib
import errno
import logging
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from btm.errors import BtmError, TrainingError
from btm.files import exclusive_lock, read_json, remove_leftovers
from btm.model.allocator import tune_allocator
from btm.records import Ledger, TrainResult
from btm.requests import TrainSpec
from btm.train.ranks import PeerLostError, Ranks, joined_ranks
from btm.train.start import check_output, prepare_trainer
from btm.train.trainer import Trainer

EXIT_DONE = 0
EXIT_USER_ERROR = 1
EXIT_PEER_LOST = 75
EXIT_PREEMPTED = 143

logger = logging.getLogger(__name__)


class StopRequest:
    """Remembers that the process was asked to stop."""

    def __init__(self) -> None:
        self.is_set = False

    def install(self) -> None:
        """Answer TERM and USR2 from now on."""
        for number in (signal.SIGTERM, signal.SIGUSR2):
            signal.signal(number, self._receive)

    def __call__(self) -> bool:
        """Whether a request came."""
        return self.is_set

    def _receive(self, number: int, frame: object) -> None:
        del number, frame
        self.is_set = True


def train(spec: TrainSpec, ranks: Ranks, stop_requested: StopRequest) -> bool:
    """Run ``spec`` to its end and leave ``model/`` and ``result.json``.

    Returns:
        False when it was stopped on request before the end.

    Raises:
        BtmError: If the user has to repair something.
    """
    with _owning(Path(spec.output_dir), ranks):
        check_output(spec, ranks)
        trainer = prepare_trainer(spec, ranks, stop_requested)
        _say(ranks, _beginning(spec, trainer))
        if not trainer.train():
            _say(ranks, f"stopped on request after update {trainer.progress.update}; a checkpoint of it is written")
            return False
        _finish(spec, trainer)
        _say(ranks, f"done: update {trainer.progress.update}, {trainer.progress.tokens} tokens")
    return True


def is_finished(spec: TrainSpec) -> bool:
    """Whether the result of exactly this request is there."""
    path = Path(spec.output_dir) / "result.json"
    return path.exists() and read_json(path).get("spec_sha256") == spec.sha256


def main(arguments: Sequence[str]) -> int:
    """Run the spec file named on the command line; returns the exit code."""
    tune_allocator()
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(message)s", force=True)
    stop_requested = StopRequest()
    stop_requested.install()
    try:
        if len(arguments) != 1:
            raise TrainingError(f"expected one argument, the spec file, got {len(arguments)}")
        spec = TrainSpec.load(Path(arguments[0]))
        if is_finished(spec):
            return EXIT_DONE
        _configure_torch(spec)
        with joined_ranks() as ranks:
            is_done = train(spec, ranks, stop_requested)
    except BtmError as error:
        return _failed(str(error))
    except PeerLostError as error:
        logger.error("%s", error)
        return EXIT_PEER_LOST
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS):
            raise
        return _failed(
            f"cannot write {error.filename or 'a file of the run'}: {error.strerror}; make room and run again"
        )
    return EXIT_DONE if is_done else EXIT_PREEMPTED


def _beginning(spec: TrainSpec, trainer: Trainer) -> str:
    engine = trainer.engine
    return (
        f"training {spec.name}: {engine.num_parameters} parameters in {spec.engine.dtype}, updates "
        f"{trainer.progress.update + 1} to {spec.last_update}, {engine.ranks.size} x {engine.ranks.device} with "
        f"{torch.get_num_threads()} threads"
    )


def _say(ranks: Ranks, message: str) -> None:
    if ranks.is_main:
        logger.info("%s", message)


def _finish(spec: TrainSpec, trainer: Trainer) -> None:
    if trainer.progress.dev_update != spec.last_update:
        trainer.evaluate()
    trainer.save()
    progress, engine = trainer.progress, trainer.engine
    output = Path(spec.output_dir)
    engine.save_model(output / "model", Path(spec.tokenizer_dir))
    if not engine.ranks.is_main:
        return
    losses = list(progress.dev_loss.values())
    dev_mean = sum(losses) / len(losses) if losses else 0.0
    result = TrainResult(
        name=spec.name,
        spec_sha256=spec.sha256,
        model_dir=str(output / "model"),
        ledger=Ledger(tokens=progress.tokens, flops=progress.tokens * engine.flops_per_token, seconds=progress.seconds),
        updates=progress.update - spec.first_update,
        skipped_updates=progress.spikes.num_skipped,
        final_loss=dev_mean if progress.final_loss is None else progress.final_loss,
        dev_loss=progress.dev_loss,
        realised_tokens=progress.realised_tokens,
        num_parameters=engine.num_parameters,
    )
    result.save(output / "result.json")


@contextlib.contextmanager
def _owning(output: Path, ranks: Ranks) -> Iterator[None]:
    """Hold the run directory against a second training; the kernel lets go when the process dies."""
    if not ranks.is_main:
        yield
        return
    with exclusive_lock(output / ".lock", wait=False):
        remove_leftovers(output)
        yield


def _configure_torch(spec: TrainSpec) -> None:
    cores = len(os.sched_getaffinity(0)) // max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    torch.set_num_threads(max(1, int(os.environ.get("OMP_NUM_THREADS") or cores)))
    if spec.engine.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        # Would write NaN into every new tensor; nothing here reads memory before it is written.
        torch.utils.deterministic.fill_uninitialized_memory = False  # pyright: ignore[reportAttributeAccessIssue]


def _failed(message: str) -> int:
    logger.error("%s", " ".join(message.split()))
    return EXIT_USER_ERROR


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
