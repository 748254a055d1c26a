"""Training by domain over ranks: groups, and gradients equal to one process, for both means."""

import pytest
import torch
import torch.distributed as dist

from moe_kernels import DemixConfig, TokenInfo
from moe_kernels.domain_parallel import average_domain_gradients, domains_of_ranks
from moe_kernels.expert_parallel import average_gradients
from tests.moe_kernels.processes import run_processes

DOMAINS = 3


@pytest.mark.parametrize(
    ("num_domains", "world", "expected"),
    [
        (2, 4, ((0,), (0,), (1,), (1,))),
        (4, 2, ((0, 1), (2, 3))),
        (3, 3, ((0,), (1,), (2,))),
        (3, 2, ((0, 1), (2,))),
        (2, 3, ((0,), (0,), (1,))),
        (1, 2, ((0,), (0,))),
    ],
)
def test_groups_follow_from_the_numbers(num_domains, world, expected):
    assert domains_of_ranks(num_domains, world) == expected


def test_every_domain_has_a_rank_and_every_rank_a_domain():
    for num_domains in range(1, 12):
        for world in range(1, 12):
            shares = domains_of_ranks(num_domains, world)
            assert len(shares) == world
            assert {domain for share in shares for domain in share} == set(range(num_domains))
            assert all(shares)
    with pytest.raises(ValueError, match="world_size: got 0"):
        domains_of_ranks(2, 0)


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = torch.nn.Linear(4, 8).double()
        self.layer = DemixConfig(width=8, hidden_width=6, num_domains=DOMAINS).build().double()

    def losses(self, x, domain):
        h = self.embedding(x)
        info = TokenInfo(domain_T=torch.full((len(x),), domain))
        return (h + self.layer(h, info).hidden).square().mean()


def batch(rank):
    return torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(rank))


def step(mean):
    def run(rank, world):
        model = Model()
        (domain,) = domains_of_ranks(2, world)[rank]
        model.losses(batch(rank), domain).backward()
        average_gradients(model.embedding.parameters(), dist.group.WORLD)
        average_domain_gradients(model.layer.experts, dist.group.WORLD, mean=mean)
        return [parameter.grad for parameter in model.parameters()]

    return run


@pytest.mark.distributed
@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("mean", ["domain", "global"])
def test_l1_gradients_equal_one_process_on_the_whole_batch(world, mean, tmp_path):
    model = Model()
    shares = [share[0] for share in domains_of_ranks(2, world)]
    loss = sum(model.losses(batch(rank), domain) for rank, domain in enumerate(shares)) / world
    loss.backward()
    factor = 2 if mean == "domain" else 1
    for gradients in run_processes(step(mean), world, tmp_path):
        for (name, parameter), got in zip(model.named_parameters(), gradients, strict=True):
            if ".experts.2." in name:
                assert got is None, "the idle expert has no gradient on any rank"
            else:
                expected = parameter.grad * (factor if ".experts." in name else 1)
                torch.testing.assert_close(got, expected)
