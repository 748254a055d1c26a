"""A vocabulary shared out over processes gives the loss and the gradients of the whole one."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from training_runs import fork, rank_environments, wait

from btm.model import linear_cross_entropy, reference
from btm.model.linear_cross_entropy import linear_cross_entropy_rows, linear_cross_entropy_sum
from btm.train.ranks import joined_ranks
from btm.train.shared_vocabulary import SharedVocabulary

pytestmark = pytest.mark.distributed
ROWS, WIDTH, VOCABULARY, WORLD = 40, 6, 5, 4
"""Two, two, one and no real ids on the processes."""
PART = -(-VOCABULARY // WORLD)


def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(PART * WORLD, WIDTH, generator=generator)
    return torch.randn(ROWS, WIDTH, generator=generator), weight, torch.arange(ROWS) % VOCABULARY


def work(path: Path) -> None:
    with joined_ranks() as ranks:
        hidden, weight, targets = inputs()
        own = weight[ranks.rank * PART : (ranks.rank + 1) * PART].clone().requires_grad_()
        hidden.requires_grad_()
        shared = SharedVocabulary(ranks.rank * PART, VOCABULARY, dist.group.WORLD)
        linear_cross_entropy._CHUNK_ELEMENTS = PART * 16  # three chunks
        loss = linear_cross_entropy_sum(hidden, own, targets, shared.losses)
        (loss * 0.5).backward()
        dist.all_reduce(hidden.grad)
        rows = linear_cross_entropy_rows(hidden, own, targets, shared.losses)
        with pytest.raises(ValueError, match="got 5"):
            shared.losses(torch.zeros(1, PART), torch.tensor([VOCABULARY]), False)
        torch.save((loss.detach(), rows, hidden.grad, own.grad), path / f"{ranks.rank}.pt")


def test_shares_of_the_vocabulary_give_what_the_whole_gives(tmp_path):
    environments = rank_environments(WORLD, tmp_path / "rendezvous")
    pids = [fork(lambda: work(tmp_path), log=tmp_path / "log.txt", env=env) for env in environments]
    assert [wait(pid) for pid in pids] == [0] * WORLD, (tmp_path / "log.txt").read_text()
    hidden, weight, targets = (tensor.double() if tensor.is_floating_point() else tensor for tensor in inputs())
    hidden, weight = hidden.requires_grad_(), weight.requires_grad_()
    expected = reference.linear_cross_entropy_rows(hidden, weight[:VOCABULARY], targets)
    (expected.sum() * 0.5).backward()
    parts = [torch.load(tmp_path / f"{rank}.pt") for rank in range(WORLD)]
    for loss, rows, hidden_grad, _ in parts:
        torch.testing.assert_close(loss.double(), expected.sum(), rtol=1e-6, atol=0)
        torch.testing.assert_close(rows.double(), expected.detach(), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(hidden_grad.double(), hidden.grad, rtol=1e-5, atol=1e-6)
    whole = torch.cat([weight_grad for *_, weight_grad in parts])
    torch.testing.assert_close(whole.double(), weight.grad, rtol=1e-5, atol=1e-6)
