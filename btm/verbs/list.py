"""``btm list``: the ELMs of a forest."""

from btm.config import Config
from btm.session import console_for, existing_forest
from btm.tables import forest_table


def main(config: Config) -> None:
    """Print the ELMs as a table, or the manifest with ``json=true``."""
    forest = existing_forest(config)
    if config.output_json:
        print(forest.manifest.model_dump_json(indent=2))
    else:
        console_for(config).print(forest_table(forest.manifest))
