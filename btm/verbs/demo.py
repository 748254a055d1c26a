"""``btm demo``: ``btm run experiment=demo``, the whole method on text that every installation has."""

from btm.config import Config
from btm.verbs import run


def main(config: Config) -> None:
    """Run the demo's experiment."""
    run.main(config)
