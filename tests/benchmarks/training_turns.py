"""Trainings that take turns, each a process of its own on the same token shards: other load meets all alike."""

import argparse
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

from real_text import write_domains

from btm.config_data import DataConfig, TokenizerConfig
from btm.config_ffn import FfnConfig
from btm.config_model import EngineConfig, ModelConfig
from btm.config_train import TrainConfig
from btm.requests import PrepareSpec, Start, TokenSource, TrainSpec

VOCABULARY = 32_000
LENGTH = 512
WARM_UP = 3
POLL_S = 0.002


class Contender:
    """A training process that runs only in its turns."""

    def __init__(self, name: str, command: list[str], rows: Path, options: argparse.Namespace) -> None:
        """Start it; ``rows`` gets a line per update."""
        environment = dict(os.environ)
        if options.threads:
            environment["OMP_NUM_THREADS"] = str(options.threads)
        self.name, self.seconds = name, list[float]()
        self._rows, self._log, self._target = rows, rows.with_suffix(".log"), 0
        rows.parent.mkdir(exist_ok=True)
        with self._log.open("w") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)

    def turn(self, updates: int) -> None:
        """Let it run until ``updates`` more are done, then stop it."""
        self._target += updates
        began = time.perf_counter()
        self._process.send_signal(signal.SIGCONT)
        while len(self.rows()) < self._target:
            if self._process.poll() is not None:
                raise RuntimeError(f"{self.name} ended: {self._log.read_text()[-2000:]}")
            time.sleep(POLL_S)
        self._process.send_signal(signal.SIGSTOP)
        self.seconds.append(time.perf_counter() - began)

    def rows(self) -> list[str]:
        """Complete lines so far."""
        return self._rows.read_text(encoding="utf-8").splitlines() if self._rows.exists() else []

    def close(self) -> None:
        """End the process, stopped or not."""
        self._process.kill()
        self._process.wait()


def turn_parser(description: str | None, *, rounds: int, turn: int) -> argparse.ArgumentParser:
    """Options that :class:`Contender` and :func:`request` read, with these defaults."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--turn", type=int, default=turn, help="updates per turn")
    parser.add_argument("--sequences", type=int, default=8, help="sequences per update")
    parser.add_argument("--threads", type=int, default=0, help="0 takes all cores")
    parser.add_argument("--quick", action="store_true", help="two turns of two small updates")
    return parser


def prepare_text(folder: Path, num_domains: int, *, quick: bool) -> list[TokenSource]:
    """Training shards of the standard library's sources."""
    from btm.corpus.worker import prepare

    paths = write_domains(folder / "text", num_domains, max_bytes=2_000_000 if quick else 12_000_000)
    prepare(
        PrepareSpec(
            output_dir=str(folder / "corpus"),
            tokenizer_dir=str(folder / "tokenizer"),
            data=DataConfig(domains={name: str(path) for name, path in paths.items()}),
            tokenizer=TokenizerConfig(vocab_size=VOCABULARY),
        )
    )
    return [TokenSource(domain=name, prefix=str(folder / "corpus" / name / "train")) for name in paths]


def request(
    folder: Path,
    name: str,
    sources: list[TokenSource],
    options: argparse.Namespace,
    *,
    ffn: FfnConfig | None = None,
    **recipe: Any,
) -> TrainSpec:
    """Training of a Llama of 6 x 384 in ``folder/name``, with the recipe's settings changed by ``recipe``."""
    updates = WARM_UP + options.rounds * options.turn + 10  # more than are run, so that nobody ends by itself
    settings = {"checkpoint_every": updates, "log_every": 1, "lr": 1e-3} | recipe
    return TrainSpec(
        name=name,
        output_dir=str(folder / name),
        start=Start(kind="scratch"),
        sources=sources,
        last_update=updates,
        total_updates=updates,
        batch_sequences=options.sequences,
        tokenizer_dir=str(folder / "tokenizer"),
        model=ModelConfig(num_layers=6),
        ffn=ffn or FfnConfig(),
        train=TrainConfig(sequence_length=LENGTH, batch_tokens=options.sequences * LENGTH, **settings),
        engine=EngineConfig(),
    )
