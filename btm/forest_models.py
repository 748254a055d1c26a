"""The models of a forest in memory or merged: what the package offers in Python."""

from pathlib import Path
from typing import TYPE_CHECKING

from btm.config_ensemble import EnsembleConfig, Prior
from btm.config_merge import MergeMethodName
from btm.errors import EnsembleError, MergeError
from btm.files import read_json
from btm.forest import Forest
from btm.records import Evaluation, MergeResult

if TYPE_CHECKING:
    from btm.ensemble.causal_lm import EnsembleForCausalLM


def load_forest_ensemble(
    forest: Forest, config: EnsembleConfig | None = None, *, domain: str | None = None
) -> "EnsembleForCausalLM":
    """The ensemble of all ELMs, on the CPU; it has ``generate``, ``continue_text`` and ``perplexity``.

    Args:
        forest: An open forest.
        config: How to mix; None takes the posterior over the whole history with a uniform prior.
        domain: Whose cached prior to take, with ``prior=cached``; estimated by ``btm evaluate``.

    Raises:
        EnsembleError: If the forest is empty, or a cached prior is asked for that has not been estimated.
    """
    from btm.ensemble.causal_lm import load_ensemble

    if not forest.domains:
        raise EnsembleError(f"the forest {forest.path} has no ELM yet; `btm run` trains them, `btm add` adds one")
    config = config or EnsembleConfig()
    directories = [(name, forest.directory(name)) for name in forest.domains]
    prior = cached_prior(forest, domain) if config.prior is Prior.cached else None
    return load_ensemble(directories, config=config, prior=prior, sequence_length=trained_length(forest))


def trained_length(forest: Forest) -> int | None:
    """Tokens per sequence that the forest's models were trained on; None when it does not say."""
    path = forest.path / "config.json"
    return read_json(path)["train"]["sequence_length"] if path.is_file() else None


def merge_forest(
    forest: Forest, output_dir: Path | str, *, method: str = "uniform", weights: dict[str, float] | None = None
) -> MergeResult:
    """Average ELMs of the forest into the Hugging Face directory ``output_dir``.

    Args:
        forest: An open forest.
        output_dir: Directory to write, in one step.
        method: ``uniform``, or ``weighted`` with ``weights``.
        weights: ELM -> weight, normalised to 1; ELMs without one are left out.

    Raises:
        MergeError: If ``weights`` name an unknown ELM, or the models do not fit together.
    """
    from btm.merge.worker import merge_models

    names = [name for name in forest.domains if weights is None or name in weights]
    if unknown := sorted(set(weights or {}) - set(names)):
        raise MergeError(f"weights name no ELM of {forest.path}: {unknown}; it has {forest.domains}")
    return merge_models(
        {name: forest.directory(name) for name in names},
        output_dir,
        method=MergeMethodName.weighted if weights else MergeMethodName(method),
        weights=weights or {},
        tokenizer_dir=forest.tokenizer_dir,
    )


def cached_prior(forest: Forest, domain: str | None) -> dict[str, float]:
    """Prior over ELMs that ``btm evaluate`` estimated on the dev documents of ``domain``.

    Raises:
        EnsembleError: If there is none.
    """
    path = Path(forest.path) / "evaluation.json"
    priors = Evaluation.load(path).cached_priors if path.is_file() else {}
    if domain not in priors:
        raise EnsembleError(
            f"no cached prior for domain={domain!r}; known: {sorted(priors)}; `btm evaluate` estimates them"
        )
    return {name: weight for name, weight in priors[domain].items() if name in forest.domains}
