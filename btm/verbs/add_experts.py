"""``btm add`` and ``btm remove`` on a DEMix model: the experts of one domain join or leave, all else stays."""

from pathlib import Path

from rich.console import Console

from btm.config import Config
from btm.config_ffn import FfnLayer
from btm.config_model import Dtype
from btm.errors import ConfigError, ForestError
from btm.files import read_json
from btm.forest import Forest
from btm.plan import plan_add
from btm.plan_table import plan_tables
from btm.records import Evaluation
from btm.session import domain_groups, execute, make_context, plan_input
from btm.sparse_models import ExpertsSpec, SparseModels
from btm.verbs.evaluate import measure
from btm.verbs.run import print_evaluation

_DTYPES = {"bfloat16": Dtype.bf16, "float32": Dtype.fp32}


def add_experts(config: Config, domain: str, console: Console, *, has_text: bool) -> None:
    """Train and join the experts of ``domain``, copies of the likeliest domain's, and measure all domains.

    Args:
        config: Of the command.
        domain: To add.
        console: Where people read.
        has_text: Whether the text of the domain is known.

    Raises:
        ConfigError: If the model has no domains, there is no text, or ``engine.dtype`` is not the model's.
        ForestError: If the domain has experts already.
    """
    check_demix(config)
    models, originals = SparseModels.open(config.forest), domain_groups(config)[0]
    _check_dtype(config, models)
    is_there = domain in models.domains
    if is_there and not _is_unmeasured(config, domain):
        raise ForestError(f"the model of {config.forest} already has experts of domain {domain!r}; remove them first")
    if not has_text:
        raise ConfigError([f"btm add domain={domain} needs data.path=<text>; no ELM can join a model with ffn=demix"])
    given = plan_input(config, [name for name in models.domains if name != domain], [])
    steps = plan_add(given, domain, num_original_domains=len(originals))
    if config.dry_run:
        for table in plan_tables(steps, config, given):
            console.print(table)
        return
    with Forest.lock(config.forest):
        SparseModels.open(config.forest).clean()
        if not is_there:
            execute(steps, make_context(config, originals, []), console)
        measure(config, console)
    console.print(f"experts of {domain} joined the model of {config.forest}", markup=False)
    print_evaluation(config, console)


def remove_experts(config: Config, domain: str, console: Console) -> None:
    """Remove the experts of ``domain``; what the shared weights have learnt from its text stays.

    Raises:
        ConfigError: If the model has no domains.
        ForestError: If the domain has no experts, or the model would have none left.
    """
    check_demix(config)
    if config.dry_run:
        SparseModels.open(config.forest).without_domain(domain)
        console.print(f"would remove the experts of {domain} from the model of {config.forest}", markup=False)
        return
    with Forest.lock(config.forest):
        models = SparseModels.open(config.forest)
        models.clean()
        rest = models.without_domain(domain)
        from btm.train.experts_worker import change

        change(
            ExpertsSpec(
                root=str(config.forest),
                action="leave",
                domain=domain,
                model_dir=str(models.directory),
                experts=models.manifest.experts,
                tokenizer_dir=str(Path(config.forest) / "tokenizer"),
                output_dir=str(models.directory_for(rest)),
            )
        )
        models.publish(rest)
    console.print(
        f"removed the experts of {domain} from the model of {config.forest}; what the weights shared by all domains "
        f"have learnt from its text stays; `btm evaluate forest={config.forest}` measures the mixture of the others",
        markup=False,
        soft_wrap=True,
    )
    if heirs := [experts.domain for experts in rest if domain in experts.ancestors]:
        console.print(
            f"still carry its data, because their experts began as copies of its own: {', '.join(heirs)}", markup=False
        )


def check_demix(config: Config) -> None:
    """Refuse sparse models whose experts belong to no domain.

    Raises:
        ConfigError: If it is one.
    """
    if config.ffn.layer is not FfnLayer.demix:
        raise ConfigError(
            [
                f"{config.forest} holds one model with ffn={config.ffn.layer}, which no ELM can join or leave; only "
                f"the experts of ffn=demix belong to domains: train one with it, or a forest with ffn=dense"
            ]
        )


def _check_dtype(config: Config, models: SparseModels) -> None:
    """Refuse another arithmetic than the model's, which would change the weights and scores of all other domains.

    Raises:
        ConfigError: If it is another one.
    """
    stored = _DTYPES.get(read_json(models.directory / "config.json").get("dtype"))
    if stored is not None and config.engine.dtype is not stored:
        raise ConfigError(
            [
                f"engine.dtype must be {stored}, in which the model of {config.forest} is stored and its domains were "
                f"measured, got {config.engine.dtype}: the weights that all domains share would be rounded, or all "
                f"domains measured, in another way than before; leave engine.dtype out"
            ]
        )


def _is_unmeasured(config: Config, domain: str) -> bool:
    """Whether the command that let ``domain`` join was killed before it had measured the new model."""
    path, report = Path(config.forest) / "evaluation.json", Path(config.forest) / "report.html"
    was_added = (Path(config.forest) / "runs/expert" / domain / "result.json").is_file()
    is_measured = path.is_file() and domain in Evaluation.load(path).domains
    # The report comes last.
    is_reported = is_measured and report.is_file() and report.stat().st_mtime >= path.stat().st_mtime
    return was_added and not is_reported
