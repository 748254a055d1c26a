"""The training step of sparse models against the dense model of equal active FLOPs, in the real trainer.

``python tests/benchmarks/bench_sparse_step.py`` starts a worker (``btm.train.worker``) for the dense model and one for
each kind of expert layer, on the same token shards of several domains, with the defaults of ``ffn=`` but for the
modalities, for which the vocabulary is cut into halves. All processes live at the same time and take turns of a few
updates, see ``training_turns.py``. Active FLOPs are what each trainer reports per token; they include the output head.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path

from speed_table import Line, close
from training_turns import LENGTH, VOCABULARY, WARM_UP, Contender, prepare_text, request, turn_parser

from btm.config_ffn import FfnConfig, FfnLayer

GOAL = 1.15
NUM_DOMAINS = 4
KINDS = {
    "dense": FfnConfig(),
    "top_k": FfnConfig(layer=FfnLayer.top_k),
    "base": FfnConfig(layer=FfnLayer.base, layers="spread_1"),
    "demix": FfnConfig(layer=FfnLayer.demix),
    "modality": FfnConfig(layer=FfnLayer.modality, modality_starts=[VOCABULARY // 2]),
}


def main() -> None:
    """Run all kinds in turn and print the table."""
    options = _options()
    with tempfile.TemporaryDirectory(prefix="bench-sparse-") as scratch:
        folder = Path(scratch)
        sources = prepare_text(folder, NUM_DOMAINS, quick=options.quick)
        load = os.getloadavg()[0]
        contenders: dict[str, Contender] = {}
        try:
            for kind in KINDS:
                spec = request(folder, kind, sources, options, ffn=KINDS[kind])
                spec.save(folder / f"{kind}.json")
                command = [sys.executable, "-m", "btm.train.worker", str(folder / f"{kind}.json")]
                contenders[kind] = Contender(kind, command, Path(spec.output_dir) / "metrics.jsonl", options)
                contenders[kind].turn(WARM_UP)
            for _ in range(options.rounds):
                for contender in contenders.values():
                    contender.turn(options.turn)
            _report(contenders, options, load)
        finally:
            for contender in contenders.values():
                contender.close()


def _report(contenders: dict[str, Contender], options: argparse.Namespace, load: float) -> None:
    print(
        f"steps of Llamas of 6 x 384 with {VOCABULARY} tokens, {NUM_DOMAINS} domains, {options.sequences} x {LENGTH} "
        f"per update, {options.rounds} turns of {options.turn} updates; load {load:.2f} before, "
        f"{os.getloadavg()[0]:.2f} after"
    )
    print(f"{'':10} ms/update  fastest  MFLOP/token   ratio  of turns: median, range   last loss")
    turns = {kind: contender.seconds[1:] for kind, contender in contenders.items()}
    lines = []
    for kind, contender in contenders.items():
        last = json.loads(contender.rows()[-1])
        flops = last["train/flops_per_s"] / last["train/tokens_per_s"]
        ratio = sum(turns[kind]) / sum(turns["dense"])
        pairs = sorted(ours / dense for ours, dense in zip(turns[kind], turns["dense"], strict=True))
        each = [1e3 * seconds / options.turn for seconds in turns[kind]]
        print(
            f"{kind:10} {statistics.mean(each):9.0f} {min(each):8.0f} {flops / 1e6:12.1f} {ratio:7.3f}  "
            f"{statistics.median(pairs):.3f}, {pairs[0]:.3f} to {pairs[-1]:.3f} {last['train/loss']:18.2f}"
        )
        if kind != "dense":
            what = f"step of ffn={kind} / dense step, equal FLOPs"
            lines.append(Line(what=what, figure=ratio, goal=GOAL, at_most=True))
    close(lines)


def _options() -> argparse.Namespace:
    options = turn_parser(__doc__, rounds=5, turn=2).parse_args()
    if options.quick:
        options.rounds, options.turn, options.sequences = 2, 2, 4
    return options


if __name__ == "__main__":
    main()
