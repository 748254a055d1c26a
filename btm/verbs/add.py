"""``btm add``: one more ELM, branched, trained and joined, or an existing model imported.

A DEMix model gets the experts of one more domain instead; see :mod:`btm.verbs.add_experts`.
"""

import datetime
from pathlib import Path

from rich.console import Console

from btm.config import Config
from btm.errors import ConfigError, ForestError
from btm.files import check_name, sha256_of_file
from btm.forest import Forest
from btm.plan import only_available, plan_add, plan_evaluation
from btm.plan_table import plan_tables
from btm.records import ElmRecord, Ledger
from btm.session import (
    console_for,
    domain_groups,
    execute,
    existing_forest,
    make_context,
    plan_input,
    required_domain,
)


def main(config: Config) -> None:
    """Add ``config.domain`` to the forest."""
    domain, console = check_name(required_domain(config, "add")), console_for(config)
    forest = existing_forest(config)
    if config.ffn.is_sparse:
        from btm.verbs.add_experts import add_experts  # which measures, and so needs the verbs that use this one

        add_experts(config, domain, console, has_text=has_text(config, domain))
        return
    if domain in ("seed", *forest.domains):
        raise ForestError(f"the forest {config.forest} already has an ELM {domain!r}; remove it first")
    if not config.data.path and config.model.path and not _was_seed_path(config):
        with Forest.lock(config.forest):
            import_model(config, domain)
        console.print(f"{domain} joined {config.forest} from {config.model.path}")
        return
    if not has_text(config, domain):
        raise ConfigError([f"btm add domain={domain} needs data.path=<text>, or model.path=<model directory>"])
    if config.dry_run:
        _print_plan(config, domain, console)
        return
    with Forest.lock(config.forest):
        add_domain(config, domain, console)
    console.print(f"{domain} joined {config.forest}; `btm evaluate forest={config.forest}` measures the new forest")


def add_domain(config: Config, domain: str, console: Console, *, evaluation_name: str | None = None) -> None:
    """Branch, train and join ``domain``; evaluate the larger forest when a name for the result is given.

    The caller holds the forest's lock.
    """
    originals, novel, later = domain_groups(config)
    forest = Forest.open(config.forest)
    present = forest.domains
    if domain not in present:
        steps = plan_add(plan_input(config, present, []), domain, num_original_domains=len(originals))
        execute(steps, make_context(config, originals, []), console)
    if evaluation_name:
        others = [name for name in (*novel, *later) if name != domain]
        given = plan_input(config, [*present, domain] if domain not in present else present, others)
        steps = [step for step in plan_evaluation(given) if "/random/" not in step.name]
        finished = ["seed", "dense", *(f"join/{name}" for name in given.domains)]
        context = make_context(config, originals, [*later, *novel], evaluation_name=evaluation_name)
        execute(only_available(steps, finished), context, console)


def import_model(config: Config, domain: str) -> None:
    """Let an existing Hugging Face causal LM with the forest's tokenizer join as the ELM of ``domain``.

    Raises:
        ForestError: If it has another tokenizer or no safetensors weights.
    """
    forest, source = existing_forest(config), Path(str(config.model.path))
    num_parameters = check_importable(forest, source)
    record = ElmRecord(
        domain=domain,
        directory="",
        parents=[],
        ledger=Ledger(),
        data_fingerprint="-",
        files={},
        num_parameters=num_parameters,
        origin="imported",
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    )
    forest.join(record, source)


def check_importable(forest: Forest, source: Path) -> int:
    """Refuse a model that cannot live in the forest.

    Returns:
        Its number of weights.

    Raises:
        ForestError: If it is not a model directory, would need pickles, has another tokenizer, or values that are not
            finite.
        MergeError: If its config needs code of its own, or its safetensors are damaged.
        CheckpointError: If transformers cannot load it, or it has fewer embeddings than the tokenizer has entries.
    """
    if not (source / "config.json").is_file() or not list(source.glob("*.safetensors")):
        raise ForestError(
            f"{source} is not a Hugging Face model with safetensors weights (config.json and *.safetensors); "
            "pickled weights are refused: convert them with save_pretrained(safe_serialization=True)"
        )
    own, other = forest.tokenizer_dir / "tokenizer.json", source / "tokenizer.json"
    if not other.is_file() or sha256_of_file(own) != sha256_of_file(other):
        raise ForestError(f"{source} has another tokenizer than the forest ({own}); all models of a forest share one")
    from btm.merge.model_files import open_model

    open_model(source.name, source)
    import torch

    from btm.model.causal_lm import load_model, num_parameters

    model = load_model(source, torch.bfloat16, vocab_size=forest.manifest.vocab_size)
    for name, weights in model.named_parameters():
        if not bool(torch.isfinite(weights).all()):
            raise ForestError(f"{source}: {name} holds values that are not finite; export the model again")
    return num_parameters(model)


def _was_seed_path(config: Config) -> bool:
    """Whether ``model.path`` is the one that the forest's seed came from, not one given to this command."""
    from btm.files import read_json

    stored = Path(config.forest) / "config.json"
    return stored.is_file() and read_json(stored)["model"]["path"] == config.model.path


def has_text(config: Config, domain: str) -> bool:
    """Whether the command or the forest's configuration says where the text of ``domain`` is."""
    if config.data.path or domain in config.data.add_later or domain in config.data.novel:
        return True
    return domain in domain_groups(config)[2]


def _print_plan(config: Config, domain: str, console: Console) -> None:
    forest = existing_forest(config)
    given = plan_input(config, forest.domains, [])
    steps = plan_add(given, domain, num_original_domains=len(domain_groups(config)[0]))
    for table in plan_tables(steps, config, given):
        console.print(table)
