"""A DEMix model without known domains: the mixture of its domains' models by their posterior (arXiv 2108.05036).

Whole-network passes, one per domain, as section 4 of the paper has them; the members share every tensor but experts.
"""

from pathlib import Path

import torch

from btm.config_ensemble import EnsembleConfig
from btm.corpus.tokenizer import load_tokenizer
from btm.ensemble.causal_lm import EnsembleForCausalLM
from btm.errors import EnsembleError
from btm.model.causal_lm import load_model
from btm.model.demix import dense_of_domain
from btm.model.sparse_lm import sparsity_of


def load_demix_ensemble(
    directory: Path | str,
    *,
    config: EnsembleConfig,
    prior: dict[str, float] | None = None,
    sequence_length: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> EnsembleForCausalLM:
    """Load a DEMix model as one causal language model that infers the domain from what it has read.

    Args:
        directory: Of the sparse model; its tokenizer is attached.
        config: How to mix.
        prior: Domain -> weight; None is uniform.
        sequence_length: Window in which documents are scored; None is the model's longest.
        dtype: Type of the weights in memory.

    Returns:
        The mixture, in evaluation mode.

    Raises:
        CheckpointError: If the directory cannot be loaded.
        ConfigError: If it holds sparse layers that have no domains.
        EnsembleError: If it holds a dense model.
    """
    model = load_model(directory, dtype)
    sparsity = sparsity_of(model)
    if sparsity is None:
        raise EnsembleError(f"{directory} is a dense model; a mixture over domains needs one trained with ffn=demix")
    members = [dense_of_domain(model, domain) for domain in sparsity.domains]
    ensemble = EnsembleForCausalLM(
        members, names=sparsity.domains, prior=prior, ensemble=config, sequence_length=sequence_length
    )
    if (Path(directory) / "tokenizer.json").is_file():
        ensemble.tokenizer = load_tokenizer(directory)
    return ensemble
