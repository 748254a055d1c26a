"""``btm list`` and ``btm inspect`` on a run that trained one sparse model: of a DEMix model they show the domains."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from btm.config import Config
from btm.config_ffn import FfnLayer
from btm.errors import ForestError
from btm.files import sha256_of_file
from btm.merge.model_files import open_model
from btm.records import TrainResult
from btm.session import console_for
from btm.sparse_models import FIRST_MODEL, DomainExperts, SparseModels
from btm.tables import format_count, format_duration, format_flops, key_value_table, rows_table
from btm.verbs.add_experts import check_demix

_FIRST_RUN = "runs/sparse/result.json"


def list_experts(config: Config) -> None:
    """Print the domains of a DEMix model, or what model another sparse run has.

    Raises:
        ForestError: If no model is trained yet, or it cannot be read.
    """
    rows = _rows(config) if config.ffn.layer is FfnLayer.demix else []
    if config.output_json:
        print(json.dumps(_model(config) | {"domains": rows}, indent=2))
        return
    console = console_for(config)
    if config.ffn.layer is not FfnLayer.demix:
        console.print(key_value_table(_model(config), title=f"one sparse model in {config.forest}"))
        console.print(
            f"experts of ffn={config.ffn.layer} belong to no domain; `btm evaluate forest={config.forest}` measures "
            "the model, ffn=demix trains one with experts that can be listed, added and removed by domain",
            markup=False,
        )
        return
    headings = ("domain", "experts began as", "parameters", "tokens", "FLOPs", "time", "dev loss")
    cells = [
        (
            row["domain"],
            " < ".join(row["ancestors"]) or "the dense network",
            format_count(row["num_parameters"]),
            format_count(row["tokens"]),
            *_cost(row),
            "-" if row["dev_loss"] is None else f"{row['dev_loss']:.3f}",
        )
        for row in rows
    ]
    model = _model(config)
    title = f"domains of the DEMix model of {config.forest}: {len(rows)}"
    console.print(rows_table(headings, cells, title=title))
    console.print(
        f"first training, shared by the domains without a cost of their own: {format_count(model['tokens'])} tokens, "
        f"{format_flops(model['flops'])} FLOPs, {format_duration(model['seconds'])}; model: {model['directory']}",
        markup=False,
    )


def inspect_experts(config: Config, domain: str) -> None:
    """Print what is known of the experts of ``domain``, and check that the model has them.

    Raises:
        ConfigError: If the experts of the model belong to no domain.
        ForestError: If the model has none of this domain, or its weights are damaged.
    """
    check_demix(config)
    SparseModels.open(config.forest).experts(domain)
    (row,) = (row for row in _rows(config) if row["domain"] == domain)
    model = _model(config)
    hashes = {path.name: sha256_of_file(path) for path in sorted((Path(config.forest) / model["directory"]).iterdir())}
    if config.output_json:
        print(json.dumps(row | {"model": model, "files": hashes}, indent=2))
        return
    flops, time = _cost(row)
    facts = {
        "domain": domain,
        "id in the model": row["id"],
        "experts began as copies of": " < ".join(row["ancestors"]) or "the dense network, like all the first ones",
        "parameters": f"{row['num_parameters']:,}",
        "tokens read": f"{row['tokens']:,}",
        "FLOPs": flops,
        "training time": time,
        "dev loss": "-" if row["dev_loss"] is None else f"{row['dev_loss']:.4f} nats/token",
        "weights": row["weights"],
        "model": model["directory"],
        "parameters of the model": f"{model['num_parameters']:,}",
    }
    console = console_for(config)
    console.print(key_value_table(facts))
    console.print(key_value_table(hashes, title="files of the model (SHA-256)"))


def _rows(config: Config) -> list[dict[str, Any]]:
    forest = Path(config.forest)
    models = SparseModels.open(forest)
    first = TrainResult.load(forest / _FIRST_RUN)
    sizes = _expert_sizes(models)
    return [_row(one, number, forest, first, sizes[number]) for number, one in enumerate(models.manifest.experts)]


def _row(experts: DomainExperts, number: int, forest: Path, first: TrainResult, size: int) -> dict[str, Any]:
    """One domain; one of the first has no cost of its own: all were trained together."""
    name, own = experts.domain, forest / "runs/expert" / experts.domain / "result.json"
    has_joined = bool(experts.ledger.tokens)
    result = TrainResult.load(own) if has_joined and own.is_file() else None if has_joined else first
    return experts.model_dump(mode="json", exclude={"ledger"}) | {
        "id": number,
        "num_parameters": size,
        "tokens": experts.ledger.tokens if has_joined else first.realised_tokens.get(name, 0),
        "ledger": experts.ledger.model_dump() if has_joined else None,
        "dev_loss": result.dev_loss.get(name) if result else None,
    }


def _cost(row: dict[str, Any]) -> tuple[str, str]:
    ledger = row["ledger"]
    return (format_flops(ledger["flops"]), format_duration(ledger["seconds"])) if ledger else ("shared", "shared")


def _model(config: Config) -> dict[str, Any]:
    """What is known of the one model; its cost is that of the first training."""
    forest = Path(config.forest)
    models = SparseModels.open(forest)
    first = TrainResult.load(forest / _FIRST_RUN)
    tensors = open_model("sparse", models.directory).tensors.values()
    return {
        "ffn": config.ffn.layer.value,
        "directory": models.manifest.model,
        "num_parameters": sum(_elements(tensor.shape) for tensor in tensors),
        "is_first": models.manifest.model == FIRST_MODEL,
        **first.ledger.model_dump(),
    }


def _expert_sizes(models: SparseModels) -> list[int]:
    """Weights of the experts of each domain, from the header of the model's file.

    Raises:
        ForestError: If the file has other experts than ``experts.json`` says.
    """
    sizes: dict[int, int] = {}
    for name, tensor in open_model("sparse", models.directory).tensors.items():
        if found := re.search(r"\.experts\.experts\.(\d+)\.", name):
            number = int(found[1])
            sizes[number] = sizes.get(number, 0) + _elements(tensor.shape)
    if sorted(sizes) != list(range(len(models.domains))):
        raise ForestError(
            f"{models.directory} has experts number {sorted(sizes)}, but there are {len(models.domains)} domains "
            f"{models.domains}; restore it from a copy"
        )
    return [sizes[number] for number in range(len(models.domains))]


def _elements(shape: Sequence[int]) -> int:
    total = 1
    for length in shape:
        total *= length
    return total
