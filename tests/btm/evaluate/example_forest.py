"""A made-up forest directory, for tests of what people look at. Figures have the directions of a good run."""

import json
import math
import random
from pathlib import Path

from btm.config import Config
from btm.config_model import EngineConfig, ModelConfig
from btm.config_parse import config_to_dict
from btm.config_train import TrainConfig
from btm.records import (
    DomainScore,
    ElmRecord,
    Evaluation,
    ForestManifest,
    Ledger,
    ModelScores,
    Parent,
    PosteriorTrace,
    TrainResult,
)
from btm.requests import Start, TokenSource, TrainSpec

EIGHT = [
    "biology-records",
    "go-code",
    "man-de",
    "office-help-en",
    "postgres-docs",
    "python-docs",
    "scripture",
    "sqlite-docs",
]
NOVEL = ["kernel-documentation-and-mailing-lists", "perl-docs"]
TRAIN = TrainConfig(tokens=3_276_800)


def score(perplexity: float, spread: float = 0.04) -> DomainScore:
    low, high = perplexity * (1 - spread), perplexity * (1 + spread)
    bits = math.log2(perplexity) / 3.6
    return DomainScore(perplexity=perplexity, low=low, high=high, bits_per_byte=bits, tokens=65_536)


def example_evaluation(
    domains: list[str], novel: list[str], *, factor: dict[str, float] | None = None, added: str | None = None
) -> Evaluation:
    """Rows as a run with all baselines leaves them; ``factor`` sets how much worse than the best a row is.

    Without its ELM (``added``) a novel domain is read half again as badly.
    """
    chance = random.Random(0)
    base = {domain: 60 + 90 * chance.random() for domain in [*domains, *novel]}
    factors = {"seed": 1.45, "dense": 1.15}
    elms = [*domains, *([added] if added else [])]
    factors |= {f"elm/{domain}": 0.0 for domain in elms}
    factors |= {"average/uniform": 1.75, "average/posterior": 1.2}
    factors |= {"ensemble/uniform": 1.01, "ensemble/updating": 1.0, "ensemble/cached": 1.005}
    factors |= {"random_split/ensemble": 1.22} | (factor or {})
    models = {}
    for name, times in factors.items():
        rows = {}
        for domain, value in base.items():
            own = name == f"elm/{domain}"
            unknown = 1.0 if domain in elms or not name.startswith("ensemble") else 1.5
            rows[domain] = score(value * unknown * (times or (1.0 if own else 2.2 + 3 * chance.random())))
        models[name] = ModelScores(domains=rows, ledger=_ledger(name, len(domains)))
    return Evaluation(
        domains=domains,
        novel_domains=novel,
        models=models,
        traces=[example_trace(elms, domain, chance) for domain in elms[:2]],
        cached_priors={
            domain: {elm: 0.9 if elm == domain else 0.1 / max(1, len(elms) - 1) for elm in elms} for domain in domains
        },
        sequence_length=256,
    )


def example_trace(elms: list[str], domain: str, chance: random.Random, length: int = 240) -> PosteriorTrace:
    words = [
        "SELECT",
        " the",
        " column",
        "\n",
        " name",
        "<b>",
        "&",
        " from",
        " \u4e2d\u6587",
        "\u00e9t\u00e9",
        "</script>",
    ]
    logits = [0.0] * len(elms)
    weights = []
    for _ in range(length):
        for index, elm in enumerate(elms):
            logits[index] += 0.06 * (elm == domain) + 0.25 * chance.gauss(0, 1)
        top = max(logits)
        masses = [math.exp(value - top) for value in logits]
        weights.append([mass / sum(masses) for mass in masses])
    tokens = [chance.choice(words) for _ in range(length)]
    return PosteriorTrace(domain=domain, elms=elms, tokens=tokens, weights=weights)


def write_forest(
    path: Path, domains: list[str] = EIGHT, novel: list[str] = NOVEL, *, added: str | None = "sqlite-docs"
):
    """Write manifest, configuration, evaluation, runs and summary of a finished forest under ``path``."""
    path.mkdir(parents=True, exist_ok=True)
    first = [domain for domain in domains if domain != added]
    _write(path / "config.json", config_to_dict(Config(name="demo", forest="outputs/demo", train=TRAIN)))
    later = [added] if added else []
    example_evaluation(first, [*later, *novel]).save(path / "evaluation.json")
    if added:
        example_evaluation(first, [added, *novel], added=added).save(path / f"evaluation-with-{added}.json")
    _manifest(first, added).save(path / "forest.json")
    write_run(path, "seed", first=0, last=200, domains=first, parent=None)
    write_run(path, "dense", first=200, last=400, domains=first, parent="seed")
    for domain in domains:
        write_run(path, f"elm/{domain}", first=200, last=400, domains=[domain], parent="seed")
    if added:
        summary = {"name": added, "model": "ensemble/cached", "unchanged": True}
        _write(path / "summary.json", {"added_domain": summary})


def write_run(path: Path, name: str, *, first: int, last: int, domains: list[str], parent: str | None) -> None:
    """Write spec, metrics and result of one training run."""
    chance = random.Random(name)
    run, per_update = path / "runs" / name, 1024 if name.startswith(("elm", "random")) else 8192
    start = Start(kind="checkpoint", path=str(path / "runs" / parent)) if parent else Start(kind="scratch")
    spec = TrainSpec(
        name=name,
        output_dir=str(run),
        start=start,
        sources=[TokenSource(domain=domain, prefix=f"corpus/{domain}/train") for domain in domains],
        first_update=first,
        last_update=last,
        total_updates=400,
        batch_sequences=per_update // 256,
        tokenizer_dir="tokenizer",
        model=ModelConfig(),
        train=TRAIN,
        engine=EngineConfig(),
    )
    spec.save(run / "spec.json")
    rows = []
    for update in range(first + 10, last + 1, 10):
        loss = 8.3 * math.exp(-update / 90) + 4.5 + 0.08 * chance.gauss(0, 1)
        tokens = (update - first) * per_update
        rows.append({"update": update, "tokens": tokens, "time": update * 1.1, "train/loss": loss})
        rows[-1] |= {
            "train/lr": 2e-3,
            "train/grad_norm": 0.8,
            "train/tokens_per_s": per_update / 1.1,
            "train/skipped": 0,
        }
        if update % 50 == 0:
            dev = {f"eval/{domain}/loss": loss + 0.1 + 0.02 * index for index, domain in enumerate(domains)}
            rows.append({"update": update, "tokens": tokens} | dev)
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    ledger = Ledger(tokens=(last - first) * per_update, flops=(last - first) * per_update * 2.9e7, seconds=220.0)
    TrainResult(
        name=name,
        spec_sha256=spec.sha256,
        model_dir=str(run / "model"),
        ledger=ledger,
        updates=last,
        skipped_updates=0,
        final_loss=rows[-2]["train/loss"],
        realised_tokens={domain: ledger.tokens // len(domains) for domain in domains},
        num_parameters=4_300_000,
    ).save(run / "result.json")


def _ledger(name: str, num_elms: int) -> Ledger:
    tokens = {"seed": 1_638_400, "dense": 3_276_800}.get(name, 3_276_800)
    if name.startswith("elm/"):
        tokens = 1_638_400 + 1_638_400 // num_elms
    return Ledger(tokens=tokens, flops=tokens * 2.9e7, seconds=tokens / 7450)


def _manifest(first: list[str], added: str | None) -> ForestManifest:
    elms = [_record(domain, [Parent(name="seed", weight=1.0)], index) for index, domain in enumerate(first)]
    if added:
        weights = [2.0**-index for index in range(len(first))]
        parents = [Parent(name=name, weight=w / sum(weights)) for name, w in zip(first, weights, strict=True)]
        elms.append(_record(added, parents, len(first)).model_copy(update={"ancestors": first}))
    seed = _record("seed", [], 0)
    return ForestManifest(name="demo", tokenizer_sha256="ab" * 32, vocab_size=4096, seed=seed, elms=elms)


def _record(domain: str, parents: list[Parent], minute: int) -> ElmRecord:
    return ElmRecord(
        domain=domain,
        directory=f"elms/{domain}",
        parents=parents,
        ledger=Ledger(tokens=204_800, flops=5.9e12, seconds=61.0),
        data_fingerprint="cd" * 32,
        files={"model.safetensors": "ef" * 32, "config.json": "01" * 32},
        num_parameters=4_300_000,
        dev_loss={domain: 4.52},
        created=f"2026-03-01T12:{minute:02d}:00+00:00",
    )


def _write(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")
