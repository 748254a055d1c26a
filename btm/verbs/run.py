"""``btm run``: a whole forest from text, with its baselines, evaluation and report."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from btm.budget import divide_updates
from btm.config import Config
from btm.config_launch import ExecutorName
from btm.errors import ForestError
from btm.forest import Forest
from btm.merge.model_files import open_model
from btm.plan import plan_run
from btm.plan_steps import Step
from btm.plan_table import plan_tables
from btm.records import Evaluation
from btm.session import (
    check_writable,
    console_for,
    domain_groups,
    execute,
    make_context,
    plan_input,
    store_config,
)
from btm.summary import write_summary
from btm.verbs.add import add_domain
from btm.verbs.slurm import submission_lines


def main(config: Config) -> None:
    """Run the plan; print it only, when ``dry_run=true``."""
    console = console_for(config)
    domains, novel, later = domain_groups(config)
    given = plan_input(config, domains, [*novel, *later])
    steps = plan_run(given)
    if config.dry_run:
        for table in plan_tables(steps, config, given):
            console.print(table)
        if config.launch.executor is ExecutorName.slurm:
            print("\n".join(submission_lines(steps, config)))
        return
    if config.ffn.is_sparse:
        later = []  # nothing joins one model
    run_forest(config, steps, console)
    summary = write_summary(Path(config.forest), later)
    if later:
        from btm.evaluate.report import write_report

        write_report(Path(config.forest))  # the first one could not know of the domains added since
    if config.output_json:
        print(json.dumps(summary, indent=2))
        return
    print_evaluation(config, console)
    for relation in summary["relations"]:
        verdict = "holds" if relation["holds"] else "DOES NOT HOLD"
        console.print(f"{relation['claim']}: {relation['left']:.2f} < {relation['right']:.2f} {verdict}", markup=False)


def run_forest(config: Config, steps: Sequence[Step], console: Console) -> None:
    """Run the first round, then add the domains that join later.

    Raises:
        ForestError: If the disk cannot hold the run.
        MergeError: If the model that is to be the seed cannot be read as data.
        RunError: If a step failed for good.
    """
    domains, novel, later = domain_groups(config)
    forest_dir = Path(config.forest)
    check_writable(forest_dir)
    if config.model.path and not Forest.exists(forest_dir):
        open_model("seed", Path(config.model.path))
    forest_dir.mkdir(parents=True, exist_ok=True)
    with Forest.lock(forest_dir):
        check_disk(steps, forest_dir)
        store_config(config)
        if Forest.exists(forest_dir):
            Forest.open(forest_dir).clean()
        updates = divide_updates(config.train, len(domains))
        phase = f" with ffn={config.ffn.layer}" if config.ffn.is_sparse else f" ({updates.seed} of them seed phase)"
        console.print(
            f"{len(domains)} domains, {updates.total} updates{phase}, "
            f"{updates.total * updates.batch_sequences * config.train.sequence_length:,} tokens in {forest_dir}"
        )
        execute(steps, make_context(config, domains, [*novel, *later]), console)
        for domain in later if not config.ffn.is_sparse else ():
            add_domain(config, domain, console, evaluation_name=f"evaluation-with-{domain}.json")


def check_disk(steps: Sequence[Step], forest_dir: Path) -> None:
    """Refuse a run that cannot fit on the disk.

    Raises:
        ForestError: With the bytes needed and free.
    """
    needed = sum(step.disk_bytes for step in steps)
    free = shutil.disk_usage(forest_dir).free
    if needed > free:
        raise ForestError(
            f"{forest_dir} has {free:,} bytes free, the plan needs about {needed:,}; "
            "free some, or choose another forest=..."
        )


def print_evaluation(config: Config, console: Console) -> None:
    """Print the table of the forest's evaluation, and where the report is."""
    from btm.modality_table import modality_table, routing_sentence
    from btm.tables import evaluation_table

    forest_dir = Path(config.forest)
    evaluation = Evaluation.load(forest_dir / "evaluation.json")
    console.print(evaluation_table(evaluation))
    if table := modality_table(evaluation):
        console.print(table)
    if sentence := routing_sentence(evaluation):
        console.print(sentence)
    console.print(f"report: {forest_dir / 'report.html'}", soft_wrap=True)
