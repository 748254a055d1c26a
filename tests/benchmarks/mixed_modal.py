"""Compare dense, modality-split, mixed and modality-aware models on pictures with captions (Lin et al. 2024).

``python tests/benchmarks/mixed_modal.py pictures/`` (``make mixed-modal PICTURES=pictures/``) trains each model by one
``btm run experiment=mixed_modal`` of its own, with equal tokens and equal active FLOPs per token, and prints the loss
of text and of image tokens apart, routed as in training and causally. ``pictures/`` holds ``captions.jsonl`` with a
line a picture, ``{"image": "apple.png", "captions": ...}`` (see ``btm/corpus/images``). Interrupted, the same command
goes on where it was; what follows ``--`` goes to every ``btm run``, as in ``-- model.hidden_size=256``.

https://arxiv.org/abs/2407.21770; expected there: modalities split help pictures most, experts that choose beat a dense
model, causal routing costs a little, and much with a mixture of depths. ``mixed_modal_results.txt`` has one run.
"""

import argparse
import json
import math
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from btm.files import write_json
from btm.modality_table import losses_by_domain
from btm.records import TRAINING_ROUTING, Evaluation, TrainResult

DOMAIN = "pictures"
SEED_SHARE, ROUTER_SHARE = 0.25, 0.25
"""Tokens of the seed of the upcycled model, and of auxiliary routers, as shares of those of a model."""
LAYERS, DEEP_LAYERS = 3, 4
"""Half of the layers of a mixture of depths pass a quarter of the tokens: 4 cost what 3 whole ones do."""


@dataclass(frozen=True)
class Training:
    """One ``btm run``."""

    name: str
    overrides: tuple[str, ...]
    tokens: float = 1.0
    """As a share of those of a model."""


@dataclass(frozen=True)
class Row:
    """One model with one routing."""

    model: str
    routing: str
    loss: float
    """Nats per token of all test tokens."""
    text: float
    image: float
    flops_per_token: float
    """Active, in training, forward and backward."""
    tokens: int
    parameters: int


def trainings(tokens: int, out: Path) -> list[Training]:
    """All runs, in an order in which each finds what it needs."""
    learned = f"ffn.auxiliary_tokens={round(ROUTER_SHARE * tokens)}"
    return [
        Training("1t1i", ("ffn=modality", "ffn.group_sizes=[1,1]", "baselines=dense")),
        Training("mixed-8", ("ffn=modality", "ffn.group_sizes=[8]", learned)),
        Training("4t4i", ("ffn=modality", learned)),
        Training(
            "4t4i+depths",
            ("ffn=modality", "ffn.depth_fraction=0.25", f"model.num_layers={DEEP_LAYERS}", learned),
        ),
        Training("seed", ("ffn=modality", "ffn.group_sizes=[1,1]"), SEED_SHARE),
        Training(
            "4t4i upcycled",
            ("ffn=modality", f"ffn.upcycle_from={out / 'seed'}", learned),
            1 - SEED_SHARE,
        ),
    ]


def forest_of(out: Path, name: str) -> Path:
    """Directory of a run."""
    return out / name.replace(" ", "-")


def run(training: Training, pictures: Path, out: Path, tokens: int, more: Sequence[str]) -> None:
    """Run or finish one training.

    Raises:
        SystemExit: If it failed; its output has said why.
    """
    overrides = (
        "experiment=mixed_modal",
        f"data.domains.{DOMAIN}={pictures}",
        f"forest={forest_of(out, training.name)}",
        *training.overrides,
        *more,
        f"train.tokens={round(training.tokens * tokens)}",
    )
    print(f"\n{training.name}: btm run {' '.join(overrides)}", flush=True)
    done = subprocess.run([sys.executable, "-m", "btm.cli", "run", *overrides], check=False)
    if done.returncode:
        sys.exit(done.returncode)


def rows_of(out: Path, name: str) -> list[Row]:
    """What the evaluation of a run found."""
    forest = forest_of(out, name)
    evaluation = Evaluation.load(forest / "evaluation.json")
    both = TRAINING_ROUTING in evaluation.models
    named = {"dense": ("dense", "-"), TRAINING_ROUTING: (name, "as in training")}
    named["sparse"] = (name, "causal" if both else "-")
    found = []
    for row in ("dense", TRAINING_ROUTING, "sparse"):
        if row not in evaluation.models:
            continue
        scores = evaluation.models[row]
        result = TrainResult.load(forest / "runs" / ("dense" if row == "dense" else "sparse") / "result.json")
        kinds = losses_by_domain(scores)[DOMAIN]
        ledger = (evaluation.models[TRAINING_ROUTING] if both and row == "sparse" else scores).ledger
        assert ledger is not None
        found.append(
            Row(
                model=named[row][0],
                routing=named[row][1],
                loss=math.log(scores.domains[DOMAIN].perplexity),
                text=kinds["text"],
                image=kinds["image"],
                flops_per_token=ledger.flops / ledger.tokens,
                tokens=ledger.tokens,
                parameters=result.num_parameters,
            )
        )
    return found


def relations(rows: Sequence[Row]) -> list[tuple[str, float, float]]:
    """Claims of the paper as pairs of losses (or differences of them), the first of which should be smaller."""
    best = {(row.model, row.routing != "causal"): row for row in rows}
    dense, split = best["dense", True], best["1t1i", True]
    found = [("1t1i reads image tokens better than dense", split.image, dense.image)]
    gains = (dense.text - split.text, dense.image - split.image)
    found.append(("1t1i gains more on image tokens than on text tokens", *gains))
    for name in ("mixed-8", "4t4i"):
        found.append((f"{name}, routed as in training, beats dense", best[name, True].loss, dense.loss))
    found.append(("4t4i reads image tokens better than mixed-8", best["4t4i", True].image, best["mixed-8", True].image))
    found.append(("4t4i beats 1t1i", best["4t4i", True].loss, split.loss))
    found.append(("4t4i still beats dense when routed causally", best["4t4i", False].loss, dense.loss))
    upcycled = best["4t4i upcycled", True]
    found.append(("4t4i upcycled beats 4t4i from scratch", upcycled.loss, best["4t4i", True].loss))
    gap = {name: best[name, False].loss - best[name, True].loss for name in ("4t4i", "4t4i+depths")}
    gained = dense.loss - split.loss
    found.append(("causal routing costs 4t4i little: less than 1t1i gained on dense", gap["4t4i"], gained))
    found.append(("causal routing costs more with a mixture of depths", gap["4t4i"], gap["4t4i+depths"]))
    return found


def print_rows(rows: Sequence[Row], console: Console) -> None:
    """The table: losses, the gap between the routings, costs."""
    table = Table(title="test loss in nats per token", title_justify="left", box=None, padding=(0, 1))
    for heading in ("model", "routing"):
        table.add_column(heading, no_wrap=True)
    for heading in ("all", "text", "image", "causal gap", "MFLOPs/token", "tokens", "parameters"):
        table.add_column(heading, justify="right", no_wrap=True)
    trained = {row.model: row.loss for row in rows if row.routing == "as in training"}
    for row in rows:
        gap = f"{row.loss - trained[row.model]:+.3f}" if row.routing == "causal" else ""
        losses = (f"{value:.3f}" for value in (row.loss, row.text, row.image))
        table.add_row(
            row.model,
            row.routing,
            *losses,
            gap,
            f"{row.flops_per_token / 1e6:.2f}",
            f"{row.tokens:,}",
            f"{row.parameters:,}",
        )
    console.print(table)


def report_jump(out: Path, console: Console) -> None:
    """What upcycling did to the loss before the first update."""
    lines = (forest_of(out, "4t4i upcycled") / "runs/sparse/metrics.jsonl").read_text().splitlines()
    first = next(row for row in map(json.loads, lines) if f"eval/{DOMAIN}/upcycling_jump" in row)
    before, after = first[f"eval/{DOMAIN}/seed_loss"], first[f"eval/{DOMAIN}/loss"]
    console.print(f"upcycling: dev loss {before:.3f} of the seed, {after:.3f} of its copies ({after - before:+.3f})")


def main(arguments: Sequence[str] | None = None) -> None:
    """Train what is not trained, then print and store the comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pictures", type=Path, help="folder with captions.jsonl and the pictures that it names")
    parser.add_argument("--out", type=Path, default=Path("outputs/mixed_modal"), help="where the forests are kept")
    parser.add_argument("--tokens", type=int, default=1_638_400, help="training tokens of each model")
    words = list(sys.argv[1:] if arguments is None else arguments)
    own = words.index("--") if "--" in words else len(words)
    given, overrides = parser.parse_args(words[:own]), words[own + 1 :]
    if not (given.pictures / "captions.jsonl").is_file():
        parser.error(f"{given.pictures} has no captions.jsonl; give a folder with one line a picture in it")
    pictures, out = given.pictures.resolve(), given.out.resolve()
    runs = trainings(given.tokens, out)
    for training in runs:
        run(training, pictures, out, given.tokens, overrides)
    rows = [row for training in runs if training.name != "seed" for row in rows_of(out, training.name)]
    rows.sort(key=lambda row: row.model != "dense")
    console = Console(width=120)
    console.print()
    print_rows(rows, console)
    report_jump(out, console)
    claims = relations(rows)
    for claim, left, right in claims:
        console.print(f"{claim}: {left:.3f} < {right:.3f} {'holds' if left < right else 'DOES NOT HOLD'}", markup=False)
    stored = [{"claim": claim, "left": left, "right": right, "holds": left < right} for claim, left, right in claims]
    write_json(out / "mixed_modal.json", {"rows": [asdict(row) for row in rows], "relations": stored})
    console.print(f"figures: {out / 'mixed_modal.json'}", soft_wrap=True)


if __name__ == "__main__":
    main()
