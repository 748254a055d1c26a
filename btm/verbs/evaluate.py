"""``btm evaluate``: measure the forest as it is now."""

from pathlib import Path

from rich.console import Console

from btm.config import Config
from btm.config_ffn import FfnLayer
from btm.errors import ForestError
from btm.forest import Forest
from btm.plan import only_available, plan_evaluation
from btm.plan_steps import ROUTERS
from btm.records import Evaluation
from btm.session import console_for, domain_groups, execute, existing_forest, make_context, plan_input
from btm.sparse_models import SparseModels
from btm.verbs.run import print_evaluation


def main(config: Config) -> None:
    """Score what has no score yet, average, mix, and write ``evaluation.json`` and the report.

    Raises:
        ForestError: If the forest has no ELM yet.
    """
    console = console_for(config)
    existing_forest(config)
    with Forest.lock(config.forest):
        measure(config, console)
    if config.output_json:
        print(Evaluation.load(Path(config.forest) / "evaluation.json").model_dump_json(indent=2))
    else:
        print_evaluation(config, console)


def measure(config: Config, console: Console) -> None:
    """Run the steps of ``btm evaluate``; the caller holds the forest's lock.

    Raises:
        ForestError: If the forest has no ELM yet.
    """
    forest = existing_forest(config)
    if not forest.domains and not config.ffn.is_sparse:
        raise ForestError(f"the forest {config.forest} has no ELM yet; `btm run` trains them, `btm add` adds one")
    originals, novel, later = domain_groups(config)
    trained = originals if config.ffn.is_sparse else forest.domains
    prepared = Path(config.forest) / "corpus"
    known = [*originals, *novel, *later]
    if config.ffn.layer is FfnLayer.demix:
        trained = SparseModels.open(config.forest).domains
        # The mixture also reads domains whose experts have left.
        known += sorted({path.parent.name for path in prepared.glob("*/corpus.json")} - set(known))
    others = [name for name in known if name not in trained]
    owned = [name for name in trained if (prepared / name / "corpus.json").is_file()]
    config = _only_finished_baselines(config)
    given = plan_input(config, trained, [name for name in others if (prepared / name / "corpus.json").is_file()])
    evaluated = [name for name in given.evaluated if name in owned or name in others]
    steps = [step for step in plan_evaluation(given) if _is_possible(step.name, evaluated)]
    finished = ["seed", "sparse", ROUTERS, "dense", *(f"join/{name}" for name in forest.domains)]
    finished += [f"random/{index}" for index in range(len(originals))]
    context = make_context(config, owned, [name for name in evaluated if name not in owned])
    execute(only_available(steps, finished), context, console)


def _is_possible(step: str, evaluated: list[str]) -> bool:
    marker = "average/posterior/"
    return marker not in step or step.split(marker)[1] in evaluated


def _only_finished_baselines(config: Config) -> Config:
    runs = Path(config.forest) / "runs"
    baselines = config.baselines.model_copy(
        update={
            "dense": (runs / "dense" / "result.json").is_file(),
            "random_split": bool(list((runs / "random").glob("*/result.json"))),
        }
    )
    return config.model_copy(update={"baselines": baselines})
