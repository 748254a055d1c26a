"""The models of a forest in memory: the ensemble with the prior of a domain."""

from pathlib import Path
from typing import TYPE_CHECKING

from btm.config import EnsembleConfig, Prior
from btm.errors import EnsembleError
from btm.forest import Forest
from btm.records import Evaluation

if TYPE_CHECKING:
    from btm.ensemble.causal_lm import EnsembleForCausalLM


def load_forest_ensemble(forest: Forest, config: EnsembleConfig, *, domain: str | None = None) -> "EnsembleForCausalLM":
    """The ensemble of all ELMs; ``domain`` chooses its cached prior from the forest's evaluation.

    Raises:
        EnsembleError: If the forest is empty, or a cached prior is asked for that has not been estimated.
    """
    from btm.ensemble.causal_lm import load_ensemble

    if not forest.domains:
        raise EnsembleError(f"the forest {forest.path} has no ELM yet")
    directories = [(name, forest.directory(name)) for name in forest.domains]
    prior = cached_prior(forest, domain) if config.prior is Prior.cached else None
    return load_ensemble(directories, config=config, prior=prior)


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
