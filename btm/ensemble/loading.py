"""Open an ensemble from Hugging Face directories: only the ELMs that can become active are read."""

from collections.abc import Sequence
from pathlib import Path

import torch

from btm.config import EnsembleConfig
from btm.corpus.tokenizer import load_tokenizer
from btm.ensemble.causal_lm import EnsembleForCausalLM
from btm.ensemble.members import choose_by_prior
from btm.ensemble.posterior import log_prior_of
from btm.errors import EnsembleError
from btm.files import read_json
from btm.model.causal_lm import load_model


def load_ensemble(
    directories: Sequence[tuple[str, Path | str]],
    *,
    config: EnsembleConfig,
    prior: dict[str, float] | None = None,
    sequence_length: int | None = None,
    dtype: torch.dtype | None = None,
) -> EnsembleForCausalLM:
    """Load ELMs and join them into one causal LM, on the CPU.

    Args:
        directories: Name and directory of each ELM, in manifest order; the first directory's tokenizer is attached.
        config: How to mix. With ``top_k`` and a prior that is not uniform only those ELMs are loaded.
        prior: ELM -> weight, for instance a cached prior from ``evaluation.json``; None is uniform.
        sequence_length: Window of :meth:`EnsembleForCausalLM.perplexity`; None is the models' longest.
        dtype: Type of the weights in memory; None is the type that the first directory stores.

    Returns:
        The ensemble, in evaluation mode; move it with ``.to(device)``.

    Raises:
        EnsembleError: If there are no directories, vocabularies differ, or the prior does not fit the names.
        CheckpointError: If a directory cannot be loaded.
    """
    if not directories:
        raise EnsembleError("an ensemble needs at least one ELM, got none; `btm run` trains some")
    names = [name for name, _ in directories]
    chosen = choose_by_prior(log_prior_of(prior, names), config)
    dtype = dtype or _stored_dtype(Path(directories[0][1]))
    ensemble = EnsembleForCausalLM(
        [load_model(directories[index][1], dtype) for index in chosen],
        names=[names[index] for index in chosen],
        prior=None if prior is None else {names[index]: prior.get(names[index], 0.0) for index in chosen},
        ensemble=config,
        sequence_length=sequence_length,
    )
    folder = Path(directories[0][1])
    if (folder / "tokenizer.json").is_file():
        ensemble.tokenizer = load_tokenizer(folder)
    return ensemble


def _stored_dtype(directory: Path) -> torch.dtype:
    config = read_json(directory / "config.json")
    name = str(config.get("dtype") or config.get("torch_dtype") or "float32")
    return {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(name, torch.float32)
