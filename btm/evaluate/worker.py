"""Turn scores into the evaluation: ``python -m btm.evaluate.worker spec.json`` runs an ``EvaluateSpec``.

Everything is computed from the score files: no model is loaded, so that other priors or top-k cost seconds.
"""

import sys
import time
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from btm.ensemble.posterior import log_uniform_prior, log_weights
from btm.evaluate.mixtures import ElmScores, cached_prior, check_same_documents, mix, mixture_rows
from btm.evaluate.score import Scores, load_scores
from btm.evaluate.statistics import domain_score
from btm.model.allocator import tune_allocator
from btm.records import DomainScore, Evaluation, ModelScores, PosteriorTrace, StepResult
from btm.requests import EvaluateSpec

TRACE_TOKENS = 256
"""Tokens of a document whose posterior is shown."""
_TRACE_MIN_TOKENS = 64
_NOTES = {
    "uniform": "uniform prior",
    "updating": "prior follows the test documents (moving average)",
    "cached": "prior from dev documents",
    "fixed": "cached prior alone, context not looked at",
    "last_token": "as the published scorers: posterior of the last token only",
}
Row = dict[str, DomainScore]


def evaluate(spec: EvaluateSpec) -> Evaluation:
    """Compute every row of ``spec`` on every domain and write ``spec.output``.

    Raises:
        ForestError: If scores are missing or damaged.
        EnsembleError: If models were scored on different documents.
    """
    began = time.monotonic()
    rows: dict[str, Row] = {}
    priors: dict[str, dict[str, float]] = {}
    traces: list[PosteriorTrace] = []
    for domain in [*spec.domains, *spec.novel_domains]:
        members = _members(spec.elms, f"test-{domain}")
        prior = _prior(spec, domain)
        if prior is not None:
            priors[domain] = dict(zip(spec.elms, prior.tolist(), strict=True))
        for name, score in _domain_rows(spec, domain, members, prior).items():
            rows.setdefault(name, {})[domain] = score
        if members is not None and domain in spec.test_prefixes:
            traces.append(_trace(spec, domain, members))
    evaluation = Evaluation(
        domains=spec.domains,
        novel_domains=spec.novel_domains,
        models={name: _model_scores(name, row, spec) for name, row in rows.items()},
        traces=traces,
        cached_priors=priors,
        sequence_length=spec.sequence_length,
    )
    evaluation.save(Path(spec.output))
    result = StepResult(spec_sha256=spec.sha256, seconds=time.monotonic() - began)
    result.save(Path(spec.output + ".result"))
    return evaluation


def _domain_rows(spec: EvaluateSpec, domain: str, members: ElmScores | None, prior: torch.Tensor | None) -> Row:
    key = f"test-{domain}"
    directories = dict(spec.models)
    directories |= {row: by_domain[domain] for row, by_domain in spec.per_domain_models.items() if domain in by_domain}
    single = {row: load_scores(directory, key) for row, directory in directories.items()}
    documents: dict[str, Scores | ElmScores] = dict(single)
    logp = {row: scores.logp for row, scores in single.items()}
    if members is not None:
        documents["ensemble"] = members
        logp |= mixture_rows(members, prior, spec.ensemble)
    split = _members({directory: directory for directory in spec.random_split}, key)
    if split is not None:
        documents["random_split/ensemble"] = split
        logp["random_split/ensemble"] = mix(split, log_uniform_prior(len(spec.random_split)))
    first, reference = next(iter(documents.items()))
    for row, other in documents.items():
        check_same_documents(first, reference.document_starts, row, other.document_starts)
    # One seed per domain: all rows of a domain see the same resamples.
    seed = zlib.crc32(f"{spec.seed}/{domain}".encode())
    samples = spec.evaluate.bootstrap_samples
    starts, sizes = reference.document_starts, reference.document_bytes
    kinds = _modalities(spec, domain, int(starts[-1])) if domain in spec.pictured else None
    return {
        row: domain_score(values, starts, sizes, samples=samples, seed=seed, modalities=kinds)
        for row, values in logp.items()
    }


def _modalities(spec: EvaluateSpec, domain: str, num_tokens: int) -> dict[str, np.ndarray]:
    """Which of the scored tokens are of each modality, bool ``(tokens,)`` by its name."""
    from btm.corpus.images.vocabulary import MODALITIES, modality_of, modality_table
    from btm.corpus.shards import TokenShard

    ids = np.asarray(TokenShard(spec.test_prefixes[domain]).tokens[:num_tokens], dtype=np.int64)
    found = modality_of(ids, modality_table(spec.tokenizer_dir))
    return {name: found == number for number, name in enumerate(MODALITIES)}


def _members(directories: dict[str, str], key: str) -> ElmScores | None:
    if not directories:
        return None
    return ElmScores.of({name: load_scores(directory, key) for name, directory in directories.items()})


def _prior(spec: EvaluateSpec, domain: str) -> torch.Tensor | None:
    dev = _members(spec.elms, f"dev-{domain}")
    return None if dev is None else cached_prior(dev, spec.ensemble)


def _model_scores(row: str, domains: Row, spec: EvaluateSpec) -> ModelScores:
    family, *kind = row.split("/")
    note = spec.notes.get(row, "")
    if family == "ensemble":
        note = ", ".join([_NOTES[kind[0]], *(f"{part.replace('-', ' ')} ELMs" for part in kind[1:])])
    elif family == "random_split":
        note = "ELMs of random splits, uniform prior"
    return ModelScores(ledger=spec.ledgers.get(row) or spec.ledgers.get(family), domains=domains, note=note)


def _trace(spec: EvaluateSpec, domain: str, members: ElmScores) -> PosteriorTrace:
    """Posterior (uniform prior) before each token of one short document: the shortest that is not tiny."""
    from btm.corpus.shards import TokenShard
    from btm.corpus.tokenizer import load_tokenizer

    lengths = np.diff(members.document_starts)
    candidates = np.flatnonzero(lengths >= _TRACE_MIN_TOKENS)
    chosen = int(candidates[lengths[candidates].argmin()] if len(candidates) else lengths.argmax())
    start = int(members.document_starts[chosen])
    logp = members.logp[:, start : start + min(int(lengths[chosen]), TRACE_TOKENS)]
    log_prior = log_uniform_prior(len(spec.elms))
    weights = log_weights(logp, log_prior, mode=spec.ensemble.posterior, temper=spec.ensemble.temper).exp()
    ids = TokenShard(spec.test_prefixes[domain]).document(chosen)[: logp.shape[1]]
    tokenizer = load_tokenizer(spec.tokenizer_dir)
    return PosteriorTrace(
        domain=domain,
        elms=list(spec.elms),
        tokens=[str(tokenizer.decode([int(token)])) for token in ids],
        weights=[[round(weight, 6) for weight in column] for column in weights.T.tolist()],
    )


def main(arguments: Sequence[str]) -> None:
    """Run the spec file named on the command line."""
    tune_allocator()
    evaluate(EvaluateSpec.load(Path(arguments[0])))


if __name__ == "__main__":
    main(sys.argv[1:])
