"""``btm report``: write the HTML report again from what the forest holds."""

from pathlib import Path

from btm.config import Config
from btm.session import console_for, existing_forest


def main(config: Config) -> None:
    """Write ``report.html`` into the forest."""
    from btm.evaluate.report import write_report

    existing_forest(config)
    console_for(config).print(f"report: {write_report(Path(config.forest))}", markup=False, soft_wrap=True)
