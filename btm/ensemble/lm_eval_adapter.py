"""Score an ensemble with EleutherAI's lm-evaluation-harness, without a hub.

``python -m btm.ensemble.lm_eval_adapter --forest DIR --tasks FILE.yaml`` scores the ensemble of all ELMs;
``--model DIR`` scores one Hugging Face directory (an ELM, an average) instead. Without ``--tasks`` the forest's own
test documents become rolling perplexity tasks, one per domain. Needs the extra ``eval`` (``pip install lm-eval``).
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from btm.config_ensemble import EnsembleConfig
from btm.ensemble.causal_lm import EnsembleForCausalLM, load_ensemble
from btm.errors import EnsembleError
from btm.files import write_atomic
from btm.forest import Forest

if TYPE_CHECKING:
    from lm_eval.api.model import LM  # pyright: ignore[reportMissingImports]

_DEFAULT_DOCUMENTS = 20


def ensemble_lm(ensemble: EnsembleForCausalLM, *, batch_size: int = 8) -> "LM":
    """Wrap ``ensemble`` as a model of the harness: ``lm_eval.simple_evaluate(model=ensemble_lm(...))``.

    ``loglikelihood`` and ``generate_until`` are those of the harness for any transformers model. In
    ``loglikelihood_rolling`` the posterior goes on over the windows of a document.

    Raises:
        EnsembleError: If the ensemble has no tokenizer, or the harness is not installed.
    """
    hf_lm = _harness("lm_eval.models.huggingface").HFLM
    if ensemble.tokenizer is None:
        raise EnsembleError("the harness needs texts as tokens: set `ensemble.tokenizer`")

    class EnsembleLM(hf_lm):
        def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
            documents = [self.tok_encode(request.args[0], add_special_tokens=False) for request in requests]
            scores = ensemble.document_log_likelihoods(documents, batch_sequences=batch_size)
            totals = [float(logp.sum()) for logp in scores]
            for request, total in zip(requests, totals, strict=True):
                self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
            return totals

    return EnsembleLM(
        pretrained=ensemble,
        backend="causal",
        tokenizer=ensemble.tokenizer,
        batch_size=batch_size,
        max_length=ensemble.sequence_length,
        add_bos_token=False,
    )


def evaluate_with_harness(lm: "LM", task_files: Sequence[Path], *, limit: int | None = None) -> dict[str, Any]:
    """Run task files on ``lm``; nothing outside their folders and data is read.

    Args:
        lm: From :func:`ensemble_lm`, or any other model of the harness.
        task_files: YAML task files; the file's stem must be the task's name.
        limit: Documents per task; None takes all.

    Returns:
        Task -> metric -> value, as the harness names them.

    Raises:
        EnsembleError: If a file is missing or the harness is not installed.
    """
    evaluator, tasks = _harness("lm_eval.evaluator"), _harness("lm_eval.tasks")
    for file in task_files:
        if not file.is_file():
            raise EnsembleError(f"task file {file} does not exist")
    folders = sorted({str(file.resolve().parent) for file in task_files})
    manager = tasks.TaskManager(include_path=folders, include_defaults=False)
    names = [file.stem for file in task_files]
    results = evaluator.simple_evaluate(
        model=lm, tasks=names, task_manager=manager, limit=limit, bootstrap_iters=0, log_samples=False
    )
    return results["results"]


def write_perplexity_task(directory: Path, name: str, texts: Sequence[str]) -> Path:
    """Write ``<name>.yaml`` and ``<name>.jsonl``: a rolling perplexity task over ``texts`` for the harness.

    Returns:
        The task file.
    """
    data = directory / f"{name}.jsonl"
    write_atomic(data, "".join(json.dumps({"text": text}) + "\n" for text in texts))
    metrics = [
        {"metric": metric, "aggregation": aggregation, "higher_is_better": False}
        for metric, aggregation in (
            ("word_perplexity", "weighted_perplexity"),
            ("byte_perplexity", "weighted_perplexity"),
            ("bits_per_byte", "bits_per_byte"),
        )
    ]
    task = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data.resolve())}},
        "output_type": "loglikelihood_rolling",
        "test_split": "test",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": metrics,
    }
    path = directory / f"{name}.yaml"
    # JSON is YAML, and needs no further dependency.
    write_atomic(path, json.dumps(task, indent=2) + "\n")
    return path


def _harness(module: str) -> Any:
    import importlib

    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise EnsembleError(
            f"lm-evaluation-harness cannot be imported ({error}); install it: pip install lm-eval"
        ) from None


def _forest_tasks(forest: Forest, directory: Path, documents: int) -> list[Path]:
    """One task per domain from the test documents of the forest's corpus."""
    from btm.corpus.shards import TokenShard
    from btm.corpus.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(forest.tokenizer_dir)
    files = []
    for index in sorted((forest.path / "corpus").glob("*/test.idx")):
        shard = TokenShard(index.with_suffix(""))
        count = min(documents, shard.num_documents)
        texts = [str(tokenizer.decode(shard.document(number)[:-1].tolist())) for number in range(count)]
        files.append(write_perplexity_task(directory, index.parent.name, texts))
    return files


def _model(options: argparse.Namespace, forest: Forest | None) -> "LM":
    if options.model:
        hf_lm = _harness("lm_eval.models.huggingface").HFLM
        return hf_lm(pretrained=options.model, device="cpu", batch_size=options.batch_size)
    if forest is None:
        raise EnsembleError("give --forest DIR or --model DIR")
    directories = [(domain, forest.directory(domain)) for domain in forest.domains]
    config = EnsembleConfig.model_validate({"top_k": options.top_k})
    ensemble = load_ensemble(directories, config=config, sequence_length=options.sequence_length)
    return ensemble_lm(ensemble, batch_size=options.batch_size)


def main(arguments: Sequence[str]) -> None:
    """Run the harness as the command line asks and write its results as JSON to ``--output`` or standard output."""
    parser = argparse.ArgumentParser(prog="python -m btm.ensemble.lm_eval_adapter", description=__doc__)
    parser.add_argument("--forest", type=Path, help="forest whose ensemble is scored")
    parser.add_argument("--model", help="Hugging Face directory to score instead of the ensemble")
    parser.add_argument(
        "--tasks", type=Path, nargs="*", default=[], help="task files; default: the forest's test texts"
    )
    parser.add_argument("--limit", type=int, help="documents per task")
    parser.add_argument("--top-k", type=int, help="ELMs kept")
    parser.add_argument("--sequence-length", type=int, help="window in tokens; default: the models' longest")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args(arguments)
    forest = Forest.open(options.forest) if options.forest else None
    with tempfile.TemporaryDirectory() as folder:
        tasks = options.tasks
        if not tasks and forest:
            tasks = _forest_tasks(forest, Path(folder), options.limit or _DEFAULT_DOCUMENTS)
        if not tasks:
            raise EnsembleError("give --tasks FILE, or --forest DIR whose test documents become the tasks")
        results = evaluate_with_harness(_model(options, forest), tasks, limit=options.limit)
    text = json.dumps(results, indent=2, default=str) + "\n"
    if options.output:
        write_atomic(options.output, text)
    else:
        sys.stdout.write(text)


if __name__ == "__main__":
    main(sys.argv[1:])
