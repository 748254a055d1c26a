"""A made-up directory of a sparse run, for tests of what people look at."""

import json
import math
import random
from pathlib import Path
from typing import Any

from example_forest import TRAIN, example_trace, score

from btm.config import Config
from btm.config_ffn import FfnConfig, FfnLayer
from btm.config_model import EngineConfig, ModelConfig
from btm.config_parse import config_to_dict
from btm.corpus.token_classes import TOKEN_CLASSES
from btm.records import Evaluation, ForestManifest, Ledger, ModelScores, TrainResult
from btm.requests import Start, TokenSource, TrainSpec

DOMAINS = ["law", "go-code"]
LEDGER = Ledger(tokens=40_960, flops=3.8e10, seconds=8)


def sparse_evaluation(
    layer: FfnLayer, domains: list[str] = DOMAINS, *, factor: dict[str, float] | None = None
) -> Evaluation:
    """Rows as a sparse run with a dense baseline leaves them; ``factor`` sets how much worse than 100 a row is."""
    factors = {"sparse": 1.0, "dense": 1.1}
    is_demix = layer is FfnLayer.demix
    if is_demix:
        factors |= {"ensemble/uniform": 1.02, "ensemble/updating": 1.01, "ensemble/cached": 1.01}
    factors |= factor or {}
    chance = random.Random(0)
    return Evaluation(
        domains=domains,
        novel_domains=[],
        models={
            name: ModelScores(domains={domain: score(100 * times) for domain in domains}, ledger=LEDGER)
            for name, times in factors.items()
        },
        traces=[example_trace(domains, domain, chance) for domain in domains] if is_demix else [],
        cached_priors={d: {e: float(d == e) for e in domains} for d in domains} if is_demix else {},
        sequence_length=64,
    )


def write_sparse_run(path: Path, ffn: FfnConfig, *, blocks: list[int], num_experts: int) -> None:
    """Write manifest, configuration, evaluation and both training runs of a finished sparse run under ``path``."""
    path.mkdir(parents=True, exist_ok=True)
    config = config_to_dict(Config(name="demo", forest="outputs/demo", train=TRAIN, ffn=ffn))
    (path / "config.json").write_text(json.dumps(config))
    sparse_evaluation(ffn.layer).save(path / "evaluation.json")
    ForestManifest(name="demo", tokenizer_sha256="ab" * 32, vocab_size=512).save(path / "forest.json")
    for name, layers in (("sparse", ffn), ("dense", FfnConfig())):
        _write_run(path / "runs" / name, layers, expert_rows(blocks if name == "sparse" else [], num_experts))


def expert_rows(blocks: list[int], num_experts: int) -> list[dict[str, Any]]:
    """Metrics of 20 logged updates, a dev row behind the last: each domain prefers experts of its own."""
    rows: list[dict[str, Any]] = []
    for update in range(2, 42, 2):
        row: dict[str, Any] = {"update": update, "tokens": update * 1024, "train/loss": 6 - update / 50}
        for block in blocks:
            values = {
                "load": 1 + 3 * math.exp(-update / 9) + block / 10,
                "entropy": 0.97,
                "dropped": 0.25 / update,
                "unrouted": 0.0,
                "load_balance": 1 + 1 / update,
            }
            row |= {f"experts/{block}/{what}": value for what, value in values.items()}
        rows.append(row)
    dev: dict[str, Any] = {"update": 40, "tokens": 40_960}
    for place, domain in enumerate(DOMAINS):
        dev[f"eval/{domain}/loss"] = 5.3
        for block in blocks:
            dev[f"eval/{domain}/experts/{block}"] = [900 if e % 2 == place else 100 for e in range(num_experts)]
    for place, name in enumerate(TOKEN_CLASSES):
        for block in blocks:
            dev[f"classes/{name}/experts/{block}"] = [900 if e == place else 100 for e in range(num_experts)]
    return [*rows, dev]


def _write_run(run: Path, ffn: FfnConfig, rows: list[dict[str, Any]]) -> None:
    spec = TrainSpec(
        name=run.name,
        output_dir=str(run),
        start=Start(kind="scratch"),
        sources=[TokenSource(domain=domain, prefix=f"corpus/{domain}/train") for domain in DOMAINS],
        first_update=0,
        last_update=40,
        total_updates=40,
        batch_sequences=16,
        tokenizer_dir="tokenizer",
        model=ModelConfig(),
        ffn=ffn,
        train=TRAIN,
        engine=EngineConfig(),
    )
    spec.save(run / "spec.json")
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    TrainResult(
        name=run.name,
        spec_sha256=spec.sha256,
        model_dir=str(run / "model"),
        ledger=LEDGER,
        updates=40,
        skipped_updates=0,
        final_loss=5.2,
        num_parameters=213_000,
    ).save(run / "result.json")
