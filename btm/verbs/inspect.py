"""``btm inspect``: one ELM in full, with every file compared to its checksum; or one domain of a DEMix model."""

from btm.config import Config
from btm.errors import ForestError
from btm.session import console_for, existing_forest, required_domain
from btm.tables import elm_table


def main(config: Config) -> None:
    """Print the record of ``config.domain`` (or ``seed``) and verify the forest's files.

    Raises:
        ForestError: If a file is missing or damaged.
    """
    forest, name = existing_forest(config), required_domain(config, "inspect")
    if config.ffn.is_sparse:
        from btm.verbs.show_experts import inspect_experts

        inspect_experts(config, name)
        return
    record = forest.manifest.seed if name == "seed" and forest.manifest.seed else forest.elm(name)
    if config.output_json:
        print(record.model_dump_json(indent=2))
    else:
        console_for(config).print(elm_table(record))
    damages = [damage for damage in forest.damages() if f"/{record.directory}/" in damage]
    if damages:
        raise ForestError("\n".join([*damages, f"restore the files from a copy, or `btm remove domain={name}`"]))
