"""`btm run ffn=... engine=megatron` and `btm add`, as a user types them: the same models as on the torch engine."""

import pytest

pytest.importorskip("megatron.core")

from btm.records import TRAINING_ROUTING, Evaluation, TrainResult
from tests.conftest import SMOKE, run_btm, two_domains

pytestmark = pytest.mark.slow
TWO = ("engine=megatron", "engine.num_processes=2", "launch.cpus_per_elm=2")
MEGATRON = (*TWO, "engine.tensor_parallel=2")
TOLERANCE = 0.01
"""Of perplexities after some updates in bf16; the trainer's own tests have the layouts in fp32 within rounding."""


def log_of(forest, step: str) -> str:
    return (forest / f"runs/{step}/log.txt").read_text()


def test_a_run_under_megatron_ends_with_the_perplexities_of_the_torch_engine(sparse_run, corpora, tmp_path):
    right, arguments, _ = sparse_run("top_k")
    forest = tmp_path / "forest"
    printed = run_btm("run", *arguments, *MEGATRON, f"forest={forest}", cwd=tmp_path).stdout
    assert "sparse" in printed
    for step in ("sparse", "dense"):
        assert "2 x cpu" in log_of(forest, step)
    ours, reference = (Evaluation.load(place / "evaluation.json").models for place in (forest, right))
    assert ours.keys() == reference.keys()
    for name, model in reference.items():
        for domain, row in model.domains.items():
            assert ours[name].domains[domain].perplexity == pytest.approx(row.perplexity, rel=TOLERANCE), (name, domain)
    results = [TrainResult.load(place / "runs/sparse/result.json") for place in (forest, right)]
    assert results[0].num_parameters == results[1].num_parameters
    assert results[0].ledger.flops == results[1].ledger.flops


def test_auxiliary_routers_learn_after_a_model_that_megatron_trained(corpora, tmp_path):
    forest = tmp_path / "forest"
    layer = ("ffn=modality", "ffn.group_sizes=[4]", "ffn.auxiliary_tokens=8192")
    run_btm("run", *SMOKE, *two_domains(corpora), *layer, *MEGATRON, f"forest={forest}", cwd=tmp_path)
    models = Evaluation.load(forest / "evaluation.json").models
    assert {"sparse", TRAINING_ROUTING} <= models.keys()
    assert TrainResult.load(forest / "runs/routers/result.json").ledger.tokens > 0


def test_a_domain_joins_a_demix_model_that_megatron_trained(corpora, tmp_path):
    forest = tmp_path / "forest"
    run_btm(
        "run",
        *SMOKE,
        *two_domains(corpora),
        "ffn=demix",
        *TWO,
        "engine.expert_parallel=2",
        f"forest={forest}",
        cwd=tmp_path,
    )
    before = Evaluation.load(forest / "evaluation.json").models["sparse"].domains
    run_btm("add", f"forest={forest}", "domain=mail", f"data.path={corpora / 'mail.jsonl'}", cwd=tmp_path)
    after = Evaluation.load(forest / "evaluation.json").models["sparse"].domains
    assert after.keys() == before.keys() | {"mail"}
    assert all(after[domain] == before[domain] for domain in before)
