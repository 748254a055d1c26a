"""Expert layers under Megatron compute what one process of the torch engine computes with the same passes."""

from pathlib import Path
from typing import Any

import expert_layout_runs
import pytest
from expert_layout_runs import BF16, FP32, KINDS, MORE, SEQUENCES, known_references, passes, same
from layout_runs import Reference
from megatron_ready import MegatronEngine

from btm.train.torch_engine import TorchEngine

pytestmark = pytest.mark.distributed


def run(directory: Path, world: int, **changes: Any) -> dict:
    return expert_layout_runs.run(directory, world, make_engine=MegatronEngine, **changes)


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    """One process, the torch engine, the passes of the layout."""
    return known_references(tmp_path_factory, TorchEngine)


def layout(tensor: int, sequence: bool = False, experts: int = 1, **engine: Any) -> dict[str, Any]:
    keys = {"tensor_parallel": tensor, "sequence_parallel": sequence, "expert_parallel": experts}
    return {"name": "megatron"} | keys | engine


LAYOUTS = [
    *((world, tensor, False, 1) for world, tensor in ((1, 1), (2, 1), (2, 2), (4, 2))),
    *((world, 2, True, 1) for world in (2, 4)),
    *((world, tensor, False, 2) for world, tensor in ((2, 1), (4, 1), (4, 2))),
    (4, 2, True, 2),
]
"""Processes, those that share out a layer, whether they share out the sequence, and those that share out experts."""
QUICK = [
    ("top_k", 2, 2, False, 1, 2),
    ("base", 2, 2, True, 1, 1),
    ("demix", 2, 1, False, 2, 1),
    ("modality", 2, 2, False, 1, 1),
]
EVERY = [
    (kind, *layout, accumulation)
    for kind in KINDS | MORE
    for layout in LAYOUTS
    for accumulation in (1, 2)
    if kind != "global" or accumulation == 1
]


@pytest.mark.parametrize(
    ("kind", "world", "tensor", "sequence", "experts", "accumulation"),
    [pytest.param(*case, marks=[] if case in QUICK else pytest.mark.slow) for case in EVERY],
)
def test_every_layout_gives_what_one_process_gives(
    tmp_path, reference, kind, world, tensor, sequence, experts, accumulation
):
    groups = world // tensor
    right = reference(kind=kind, micro=passes(kind, groups, accumulation))
    micro = SEQUENCES // groups // accumulation
    same(run(tmp_path / "run", world, kind=kind, micro=micro, **layout(tensor, sequence, experts)), right, FP32)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["top_k", "base", "demix"])
def test_groups_that_run_unequally_many_passes_wait_for_each_other(tmp_path, reference, kind):
    """Five passes on two groups, and a group without dev documents in the last one."""
    changes = {"kind": kind, "sizes": (2, 2, 2, 1, 1), "micro": 1}
    same(run(tmp_path / "run", 4, **changes, **layout(2, False, 2)), reference(**changes), FP32)


@pytest.mark.slow
@pytest.mark.parametrize("sequence", [False, True])
@pytest.mark.parametrize(
    ("arch", "kind"),
    [("olmo2", "top_k"), ("olmo2", "base"), ("olmo2", "depths"), ("qwen3", "inserted"), ("mistral", "demix")],
)
def test_experts_of_other_architectures(tmp_path, reference, arch, kind, sequence):
    """Norms stand behind the feed-forward networks of OLMo 2, also where a BASE layer has replaced them."""
    changes = {"kind": kind, "arch": arch, "updates": 6}
    same(run(tmp_path / "run", 2, **changes, **layout(2, sequence)), reference(**changes), FP32)


CASES = [
    ("demix", 2, layout(2, dtype="bf16"), {}, BF16),
    # Rounding decides who takes a token on the border of two experts; later updates drift apart.
    ("top_k", 2, layout(2, True, dtype="bf16"), {"updates": 3}, BF16),
    ("base", 4, layout(2, dtype="bf16"), {"updates": 3}, BF16),
    ("demix", 4, layout(2, False, 2, dtype="bf16"), {}, BF16),
    ("base", 4, layout(2, True, 2, again=True), {}, FP32),
    ("global", 4, layout(2, True, again=True), {}, FP32),
    ("inserted", 2, layout(2, True, again=True), {}, FP32),
    ("depths", 2, layout(2, again=True), {}, FP32),
]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "world", "changes", "length", "bounds"), CASES)
def test_bf16_and_blocks_run_again(tmp_path, reference, kind, world, changes, length, bounds):
    groups = world // changes["tensor_parallel"]
    right = reference(kind=kind, micro=passes(kind, groups, 1), dtype=changes.get("dtype", "fp32"), **length)
    same(run(tmp_path / "run", world, kind=kind, **changes, **length), right, bounds)


@pytest.mark.parametrize(
    ("kind", "world", "changes"),
    [
        ("hash", 2, layout(2)),
        pytest.param("demix", 4, layout(2, True), marks=pytest.mark.slow),
        pytest.param("demix", 4, layout(2, False, 2), marks=pytest.mark.slow),
        pytest.param("hash", 4, layout(1, False, 2), marks=pytest.mark.slow),
        pytest.param("hash", 2, layout(1, dtype="bf16"), marks=pytest.mark.slow),
    ],
)
def test_an_expert_without_tokens_keeps_weights_moments_and_steps(tmp_path, kind, world, changes):
    """The third update reaches experts 0 and 2 only; momentum and weight decay would move the others, too."""
    before, after = (
        run(tmp_path / str(updates), world, kind=kind, updates=updates, **changes)["tensors"] for updates in (2, 3)
    )
    checked = 0
    for file, tensors in after.items():
        for name, tensor in tensors.items():
            if "experts" not in name:
                continue
            moved = tensor != before[file][name]
            parts = enumerate(moved) if kind == "hash" else [(int(name.split("experts.experts.")[1][0]), moved)]
            for expert, part in parts:
                assert bool(part.any()) == (expert in (0, 2)), (file, name, expert)
                checked += 1
    # Two blocks of four experts: three matrices with two moments each, and the number of steps.
    assert checked == 2 * 4 * (3 * 3 + 1)
