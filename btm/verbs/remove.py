"""``btm remove``: an ELM leaves the forest; the answer names those that still carry its data."""

from btm.config import Config
from btm.forest import Forest
from btm.session import console_for, existing_forest, required_domain


def main(config: Config) -> None:
    """Remove ``config.domain``; with ``dry_run=true`` only say what would happen."""
    domain, console = required_domain(config, "remove"), console_for(config)
    forest = existing_forest(config)
    if config.ffn.is_sparse:
        from btm.verbs.add_experts import remove_experts

        remove_experts(config, domain, console)
        return
    record = forest.elm(domain)
    if config.dry_run:
        heirs = [other.domain for other in forest.manifest.elms if domain in other.ancestors]
        console.print(f"would remove {record.directory} from {config.forest}", markup=False)
    else:
        with Forest.lock(config.forest):
            heirs = existing_forest(config).remove(domain)
        console.print(f"removed {domain} from {config.forest}", markup=False)
    if heirs:
        console.print(
            f"still carry its data, because they were branched from a mixture with it: {', '.join(heirs)}", markup=False
        )
