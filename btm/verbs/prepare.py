"""``btm prepare``: text to token shards, and stop there; ``btm run`` then uses them."""

from pathlib import Path

from btm.config import Config
from btm.forest import Forest
from btm.plan import plan_run
from btm.records import DomainInfo, PrepareResult
from btm.session import check_writable, console_for, domain_groups, execute, make_context, plan_input, store_config
from btm.tables import format_count, rows_table


def main(config: Config) -> None:
    """Prepare every domain of the configuration."""
    console = console_for(config)
    domains, novel, later = domain_groups(config)
    steps = plan_run(plan_input(config, domains, [*novel, *later]))[:1]
    check_writable(Path(config.forest))
    Path(config.forest).mkdir(parents=True, exist_ok=True)
    with Forest.lock(config.forest):
        store_config(config)
        execute(steps, make_context(config, domains, [*novel, *later]), console)
    result = PrepareResult.load(Path(config.forest) / "corpus" / "prepare.json")
    headings = ("domain", "train tokens", "dev tokens", "test tokens", "documents", "duplicates", "broken")
    rows = [_row(info) for info in result.domains.values()]
    console.print(rows_table(headings, rows, title=f"corpus of {config.forest}"))
    for warning in result.warnings:
        console.print(f"warning: {warning}", markup=False)


def _row(info: DomainInfo) -> tuple[object, ...]:
    splits = [info.splits.get(split) for split in ("train", "dev", "test")]
    return (
        info.domain,
        *(format_count(split.tokens) if split else "-" for split in splits),
        f"{sum(split.documents for split in splits if split):,}",
        f"{info.exact_duplicates + info.near_duplicates:,}",
        f"{sum(info.broken.values()):,}",
    )
