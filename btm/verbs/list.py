"""``btm list``: the ELMs of a forest, or the domains of a DEMix model."""

from btm.config import Config
from btm.session import console_for, existing_forest
from btm.tables import forest_table


def main(config: Config) -> None:
    """Print the ELMs as a table, or the manifest with ``json=true``; of a sparse run, what its model has."""
    forest = existing_forest(config)
    if config.ffn.is_sparse:
        from btm.verbs.show_experts import list_experts

        list_experts(config)
        return
    if config.output_json:
        print(forest.manifest.model_dump_json(indent=2))
    else:
        console_for(config).print(forest_table(forest.manifest))
