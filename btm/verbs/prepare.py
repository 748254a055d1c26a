"""``btm prepare``: text to token shards, and stop there; ``btm run`` then uses them."""

from pathlib import Path

from rich.table import Table

from btm.config import Config
from btm.forest import Forest
from btm.plan import plan_run
from btm.plan_table import human_count
from btm.records import PrepareResult
from btm.session import check_writable, console_for, domain_groups, execute, make_context, plan_input, store_config


def main(config: Config) -> None:
    """Prepare every domain of the configuration."""
    console = console_for(config)
    domains, novel, later = domain_groups(config)
    check_writable(Path(config.forest))
    Path(config.forest).mkdir(parents=True, exist_ok=True)
    with Forest.lock(config.forest):
        store_config(config)
        steps = plan_run(plan_input(config, domains, [*novel, *later]))[:1]
        execute(steps, make_context(config, domains, [*novel, *later]), console)
    result = PrepareResult.load(Path(config.forest) / "corpus" / "prepare.json")
    table = Table(title=f"corpus of {config.forest}", title_justify="left")
    table.add_column("domain")
    for column in ("train tokens", "dev tokens", "test tokens", "documents", "duplicates", "broken"):
        table.add_column(column, justify="right")
    for name, info in result.domains.items():
        splits = [info.splits.get(split) for split in ("train", "dev", "test")]
        table.add_row(
            name,
            *(human_count(split.tokens) if split else "-" for split in splits),
            f"{sum(split.documents for split in splits if split):,}",
            f"{info.exact_duplicates + info.near_duplicates:,}",
            f"{sum(info.broken.values()):,}",
        )
    console.print(table)
    for warning in result.warnings:
        console.print(f"warning: {warning}", markup=False)
