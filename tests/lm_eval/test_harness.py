"""lm-evaluation-harness, for real, on an ensemble, an ELM and a merged model: `make lm-eval` (extra ``eval``)."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from btm.config_ensemble import EnsembleConfig
from btm.config_parse import parse_config
from btm.corpus.shards import ShardWriter
from btm.corpus.tokenizer import TextEncoder, train_tokenizer
from btm.ensemble.causal_lm import EnsembleForCausalLM, load_ensemble
from btm.ensemble.lm_eval_adapter import ensemble_lm, evaluate_with_harness, write_perplexity_task
from btm.forest import Forest
from btm.model.causal_lm import save_model
from btm.records import ElmRecord, Ledger, Parent
from btm.session import store_config

pytestmark = pytest.mark.slow

TEXTS = [
    "The quick brown fox jumps over the lazy dog and runs away from all the other dogs. " * 3,
    "In the beginning there was a function that returned nothing, and nobody called it.",
    "A licence grants rights; a warranty limits them.",
]


@pytest.fixture(scope="module", autouse=True)
def offline(tmp_path_factory) -> None:
    """Nothing outside this machine, nothing left in the home directory."""
    os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"
    os.environ["HF_DATASETS_CACHE"] = str(tmp_path_factory.mktemp("datasets"))
    os.environ["HF_HOME"] = str(tmp_path_factory.mktemp("home"))


@pytest.fixture(scope="module")
def forest(tmp_path_factory) -> Forest:
    folder = tmp_path_factory.mktemp("harness")
    train_tokenizer(TEXTS * 20, folder / "forest/tokenizer", vocab_size=300)
    encoder = TextEncoder(folder / "forest/tokenizer")
    forest = Forest.create(folder / "forest", name="tiny", tokenizer_sha256="t", vocab_size=encoder.vocab_size)
    for seed, domain in enumerate(("law", "code")):
        torch.manual_seed(seed)
        sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
        eos = encoder.eos_id
        config = LlamaConfig(
            vocab_size=encoder.vocab_size, max_position_embeddings=48, eos_token_id=eos, bos_token_id=eos, **sizes
        )
        model = LlamaForCausalLM(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(8)
        save_model(model, folder / domain, torch.float32, folder / "forest/tokenizer")
        record = ElmRecord(
            domain=domain,
            directory="",
            parents=[Parent(name="seed", weight=1.0)],
            ledger=Ledger(),
            data_fingerprint="f",
            files={},
            num_parameters=1,
            created="2000-01-01T00:00:00+00:00",
        )
        forest.join(record, folder / domain)
        with ShardWriter(folder / "forest/corpus" / domain / "test", encoder.vocab_size) as writer:
            for ids, text in zip(encoder.encode(TEXTS), TEXTS, strict=True):
                writer.add(ids, len(text.encode()))
    return forest


@pytest.fixture(scope="module")
def ensemble(forest) -> EnsembleForCausalLM:
    directories = [(domain, forest.directory(domain)) for domain in forest.domains]
    return load_ensemble(directories, config=EnsembleConfig.model_validate({}))


def write_choice_task(folder: Path) -> Path:
    """Multiple choice: the harness asks for the likelihood of each continuation."""
    rows = [
        {"question": "The quick brown", "choices": [" fox", " function"], "answer": index % 2} for index in range(4)
    ]
    (folder / "choice.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "task": "choice",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "choice.jsonl")}},
        "output_type": "multiple_choice",
        "test_split": "test",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    (folder / "choice.yaml").write_text(json.dumps(task))
    return folder / "choice.yaml"


def write_generate_task(folder: Path) -> Path:
    (folder / "continue.jsonl").write_text("".join(json.dumps({"prompt": text[:20]}) + "\n" for text in TEXTS))
    task = {
        "task": "continue",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "continue.jsonl")}},
        "output_type": "generate_until",
        "test_split": "test",
        "doc_to_text": "{{prompt}}",
        "doc_to_target": "x",
        "generation_kwargs": {"until": ["\n\n"], "max_gen_toks": 8, "do_sample": False},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }
    (folder / "continue.yaml").write_text(json.dumps(task))
    return folder / "continue.yaml"


def test_the_harness_scores_the_ensemble_as_it_scores_itself(ensemble, tmp_path) -> None:
    """The first text is longer than a window: its posterior goes on from window to window."""
    results = evaluate_with_harness(ensemble_lm(ensemble), [write_perplexity_task(tmp_path, "prose", TEXTS)])
    encoder = ensemble.text_tokenizer
    documents = [encoder(text, add_special_tokens=False)["input_ids"] for text in TEXTS]
    assert len(documents[0]) > ensemble.sequence_length
    nats = -sum(float(logp.sum()) for logp in ensemble.document_log_likelihoods(documents))
    expected = nats / math.log(2) / sum(len(text.encode()) for text in TEXTS)
    assert math.isclose(results["prose"]["bits_per_byte,none"], expected, rel_tol=1e-6)


def test_multiple_choice_and_generation_run_on_the_ensemble(ensemble, tmp_path) -> None:
    tasks = [write_choice_task(tmp_path), write_generate_task(tmp_path)]
    results = evaluate_with_harness(ensemble_lm(ensemble), tasks)
    assert results["choice"]["acc,none"] == 0.5
    assert results["continue"]["exact_match,none"] == 0.0


def test_choices_have_the_likelihood_of_the_mixture(ensemble) -> None:
    from lm_eval.api.instance import Instance

    pairs = [("The quick brown", " fox"), ("A licence grants", " rights; a warranty")]
    requests = [
        Instance(request_type="loglikelihood", doc={}, arguments=pair, idx=index) for index, pair in enumerate(pairs)
    ]
    answers = ensemble_lm(ensemble).loglikelihood(requests)
    for (context, continuation), (given, _) in zip(pairs, answers, strict=True):
        whole, begin = (ensemble.text_tokenizer(t)["input_ids"] for t in (context + continuation, context))
        logits = ensemble(torch.tensor([whole])).logits[0]
        wanted = range(len(begin), len(whole))
        assert math.isclose(given, sum(logits[at - 1, whole[at]].item() for at in wanted), rel_tol=1e-4)


def run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_the_module_scores_a_forest_on_its_own_test_documents(forest, tmp_path) -> None:
    output = tmp_path / "results.json"
    run(sys.executable, "-m", "btm.ensemble.lm_eval_adapter", "--forest", str(forest.path), "--output", str(output))
    results = json.loads(output.read_text())
    assert set(results) == {"law", "code"}
    assert all(result["word_perplexity,none"] > 1 for result in results.values())


def plain_harness(directory: Path, task: Path, output: Path) -> float:
    """Bits per byte that the harness itself, which knows nothing of us, gives a Hugging Face directory."""
    arguments = ("--model", "hf", "--model_args", f"pretrained={directory}", "--device", "cpu", "--batch_size", "2")
    where = ("--include_path", str(task.parent), "--tasks", task.stem, "--output_path", str(output))
    run(sys.executable, "-m", "lm_eval", *arguments, *where)
    results = json.loads(next(output.rglob("results_*.json")).read_text())["results"]
    return results[task.stem]["bits_per_byte,none"]


def our_module(directory: Path, task: Path, output: Path) -> float:
    """Bits per byte of a Hugging Face directory through our entry point."""
    module = (sys.executable, "-m", "btm.ensemble.lm_eval_adapter")
    run(*module, "--model", str(directory), "--tasks", str(task), "--output", str(output))
    return json.loads(output.read_text())[task.stem]["bits_per_byte,none"]


def test_the_plain_harness_scores_an_elm_as_a_hugging_face_model(forest, tmp_path) -> None:
    task, directory = write_perplexity_task(tmp_path, "prose", TEXTS), forest.directory("law")
    ours = our_module(directory, task, tmp_path / "ours.json")
    assert math.isclose(plain_harness(directory, task, tmp_path / "plain"), ours, rel_tol=1e-6)


def test_the_plain_harness_scores_what_btm_merge_wrote(forest, tmp_path) -> None:
    """The expected model is averaged here, by hand; it must be neither of the two ELMs."""
    merged, averaged = tmp_path / "merged", tmp_path / "averaged"
    store_config(parse_config({"forest": str(forest.path), "data": {"domains": dict.fromkeys(forest.domains, "-")}}))
    btm = str(Path(sys.executable).with_name("btm"))
    run(btm, "merge", f"forest={forest.path}", "merge=weighted", "merge.weights.law=3", "merge.weights.code=1",
        f"merge.output={merged}")  # fmt: skip
    law, code = (LlamaForCausalLM.from_pretrained(forest.directory(name)) for name in ("law", "code"))
    with torch.no_grad():
        for mine, other in zip(law.parameters(), code.parameters(), strict=True):
            mine.mul_(0.75).add_(other, alpha=0.25)
    save_model(law, averaged, torch.float32, forest.tokenizer_dir)
    task = write_perplexity_task(tmp_path, "prose", TEXTS)
    given = plain_harness(merged, task, tmp_path / "plain")
    assert math.isclose(given, our_module(averaged, task, tmp_path / "expected.json"), rel_tol=1e-5)
    assert math.isclose(given, our_module(merged, task, tmp_path / "ours.json"), rel_tol=1e-6)
    for name in forest.domains:
        alone = our_module(forest.directory(name), task, tmp_path / f"{name}.json")
        assert not math.isclose(given, alone, rel_tol=1e-2)
