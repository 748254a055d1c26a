"""Change the experts of a DEMix model: ``python -m btm.train.experts_worker spec.json`` runs an ``ExpertsSpec``.

New experts are trained in a model of their own that has no others: it costs what a dense one does, and which domains
join or leave meanwhile is nothing to it. Adding a domain follows section 5 of https://arxiv.org/abs/2108.05036.
"""

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from btm.files import read_json, remove_leftovers
from btm.model.allocator import tune_allocator
from btm.requests import ScoreSource
from btm.sparse_models import ExpertsResult, ExpertsSpec
from btm.spec_file import run_spec_file

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def change(spec: ExpertsSpec) -> ExpertsResult:
    """Write the model that ``spec`` asks for, in one step.

    Raises:
        BtmError: If a model or a shard cannot be read, or they do not belong together.
    """
    import torch

    from btm.model.causal_lm import load_model, save_model
    from btm.model.demix import join_domain, remove_domain

    began = time.monotonic()
    output = Path(spec.output_dir)
    if output.parent.is_dir():
        remove_leftovers(output.parent)
    # Weights of every type go through fp32 and back unchanged.
    model = load_model(spec.model_dir)
    result = ExpertsResult(spec_sha256=spec.sha256)
    if spec.action == "branch":
        result = _branch(model, spec)
    elif spec.action == "join":
        assert spec.trained_dir is not None
        join_domain(model, load_model(spec.trained_dir), spec.domain)
    else:
        remove_domain(model, spec.domain)
    dtype = getattr(torch, read_json(Path(spec.model_dir) / "config.json")["dtype"])
    save_model(model, output, dtype, spec.tokenizer_dir)
    result = result.model_copy(update={"seconds": time.monotonic() - began})
    result.save(Path(f"{output}.json"))
    return result


def _branch(model: "PreTrainedModel", spec: ExpertsSpec) -> ExpertsResult:
    """Leave experts of the new domain alone in ``model``, copies of those with the largest posterior on dev."""
    from btm.model.demix import add_domain, remove_domain

    assert spec.dev is not None
    posterior = _posterior(model, spec, spec.dev)
    like = max(posterior, key=lambda domain: posterior[domain])
    add_domain(model, spec.domain, like=like)
    for domain in posterior:
        remove_domain(model, domain)
    parent = next(experts for experts in spec.experts if experts.domain == like)
    return ExpertsResult(
        spec_sha256=spec.sha256,
        like=like,
        weights=parent.weights,
        ancestors=[like, *parent.ancestors],
        posterior=posterior,
    )


def _posterior(model: "PreTrainedModel", spec: ExpertsSpec, dev: ScoreSource) -> dict[str, float]:
    """Mean posterior of each domain over the tokens of the new domain's dev documents."""
    import torch

    from btm.corpus.shards import TokenShard
    from btm.corpus.tokenizer import TextEncoder
    from btm.corpus.windows import document_windows
    from btm.model.demix import posterior_sums

    windows = document_windows(
        TokenShard(dev.prefix),
        sequence_length=spec.sequence_length,
        eos_id=TextEncoder(spec.tokenizer_dir).eos_id,
        max_tokens=dev.max_tokens,
        max_documents=dev.max_documents,
    )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device)  # pyright: ignore[reportArgumentType]
    total = torch.zeros(len(spec.experts), dtype=torch.float64)
    with torch.no_grad():
        for begin in range(0, len(windows.inputs), spec.batch_sequences):
            rows = slice(begin, begin + spec.batch_sequences)
            inputs, targets = (torch.from_numpy(part[rows]).to(device) for part in (windows.inputs, windows.targets))
            total += posterior_sums(model, inputs, targets).cpu()
    model.to("cpu")  # pyright: ignore[reportArgumentType]
    shares = (total / total.sum()).tolist()
    return dict(zip((experts.domain for experts in spec.experts), shares, strict=True))


def main(arguments: Sequence[str]) -> int:
    """Run the spec file named on the command line; returns the exit code."""
    tune_allocator()
    return run_spec_file(arguments, ExpertsSpec, change)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
