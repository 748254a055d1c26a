"""Routers: what each promises of counts, weights, modes and bad input."""

import pytest
import torch

from moe_kernels import TokenInfo
from moe_kernels.assignment import solve_assignment
from moe_kernels.routers import BalancedRouter, DomainRouter, ExpertChoiceRouter, HashRouter, SwitchRouter, TopKRouter
from moe_kernels.types import statistics_of

X = torch.randn(30, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("is_renormalised", [True, False])
def test_top_k_picks_the_highest_scores(score, is_renormalised):
    router = TopKRouter(8, 6, 3, score=score, is_renormalised=is_renormalised)
    routing = router(X, TokenInfo())
    logits = X @ router.weight_ED.t()
    scores = logits.softmax(1) if score == "softmax" else logits.sigmoid()
    best = scores.topk(3, dim=1)
    assert torch.equal(routing.expert_N.view(30, 3), best.indices)
    weights = best.values / best.values.sum(1, keepdim=True) if is_renormalised else best.values
    torch.testing.assert_close(routing.weight_N.view(30, 3), weights)
    torch.testing.assert_close(routing.probs_TE.sum(1), torch.ones(30))


def test_switch_weighs_by_the_probability():
    router = SwitchRouter(8, 6)
    routing = router(X, TokenInfo())
    torch.testing.assert_close(routing.weight_N, (X @ router.weight_ED.t()).softmax(1).amax(1))


@pytest.mark.parametrize(("factor", "capacity"), [(1.0, 5), (2.0, 10), (6.0, 30), (0.01, 1)])
def test_expert_choice_fills_each_expert_with_its_best_tokens(factor, capacity):
    router = ExpertChoiceRouter(8, 6, capacity_factor=factor)
    routing = router(X, TokenInfo())
    assert routing.expert_counts().tolist() == [capacity] * 6
    scores = (X @ router.weight_ED.t()).softmax(1)
    for expert in range(6):
        chosen = routing.token_N[routing.expert_N == expert]
        assert set(chosen.tolist()) == set(scores[:, expert].topk(capacity).indices.tolist())


def test_balanced_router_is_balanced_in_training_and_greedy_at_inference():
    router = BalancedRouter(8, 4)
    skewed = X + 20 * router.centroids().detach()[1]
    routing = router(skewed, TokenInfo())
    assert sorted(routing.expert_counts().tolist()) == [7, 7, 8, 8]
    frozen = router.requires_grad_(False)(skewed, TokenInfo())
    assert torch.equal(frozen.expert_N, routing.expert_N), "the mode is the flag, not requires_grad"
    greedy = router.eval()(skewed, TokenInfo())
    assert torch.equal(greedy.expert_N, (skewed @ router.centroids().t()).argmax(1))
    assert greedy.expert_counts().max() > 8


def popular_tokens(num_tokens: int, router: BalancedRouter, seed: int) -> torch.Tensor:
    """States that all like expert 1 best, and differ in how much they like the others."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_tokens, 8, generator=generator) + 20 * router.centroids().detach()[1]


def learn_prices(router: BalancedRouter, updates: int = 60) -> None:
    for update in range(updates):
        for part in (0, 1):
            router(popular_tokens(400, router, 2 * update + part), TokenInfo())
            router.prices.next_micro_batch()
        router.prices.end_update()


def test_running_prices_keep_the_experts_balanced_at_inference_one_token_at_a_time():
    router = BalancedRouter(8, 4)
    learn_prices(router)
    unseen = popular_tokens(2000, router, 10**6)
    router.eval()
    together = router(unseen, TokenInfo())
    assert statistics_of(together).max_over_mean_load < 1.2
    alone = torch.cat([router(token, TokenInfo()).expert_N for token in unseen[:50].split(1)])
    assert torch.equal(alone, together.expert_N[:50])
    plain = BalancedRouter(8, 4, is_priced=False)
    plain.load_state_dict({"large_centroid_ED": router.large_centroid_ED})
    assert statistics_of(plain.eval()(unseen, TokenInfo())).max_over_mean_load > 2.5


def test_running_prices_choose_as_the_assignment_of_many_tokens_does():
    router = BalancedRouter(8, 4)
    learn_prices(router)
    many = popular_tokens(4000, router, 10**6)
    balanced = router(many, TokenInfo()).expert_N
    assert (router.eval()(many, TokenInfo()).expert_N == balanced).float().mean() > 0.95


def test_centroids_start_small_and_adam_turns_them_slowly():
    router = BalancedRouter(64, 4)
    start = router.centroids().detach().clone()
    torch.testing.assert_close(start @ start.t(), 0.01 * torch.eye(4))
    adam = torch.optim.Adam(router.parameters(), lr=1e-3)
    for _ in range(10):
        router(torch.randn(40, 64), TokenInfo()).weight_N.sum().backward()
        adam.step()
        adam.zero_grad()
    assert torch.cosine_similarity(start, router.centroids(), dim=1).min() > 0.9


def test_prices_follow_their_definition():
    router = BalancedRouter(8, 4).double()
    parts, expected = [popular_tokens(count, router, count).double() for count in (64, 128)], torch.zeros(4)
    for _ in range(3):
        total = torch.zeros(4, dtype=torch.float64)
        for part in parts:
            for _again in range(2):  # activation checkpointing runs the forward again
                router(part, TokenInfo())
            router.prices.next_micro_batch()
            price = solve_assignment((part @ router.centroids().t()).detach()).prices_E
            total += (price - price.mean()) * len(part)
        router.prices.end_update()
        expected = 0.9 * expected + 0.1 * (total / 192)
        torch.testing.assert_close(router.prices.price_E.double(), expected, rtol=1e-5, atol=1e-6)
    before = router.prices.price_E.clone()
    router(torch.zeros(0, 8, dtype=torch.float64), TokenInfo())
    router.prices.next_micro_batch()
    router.prices.end_update()
    assert torch.equal(router.prices.price_E, before), "an update without tokens moves nothing"


def test_the_published_auction_has_no_prices():
    assert BalancedRouter(8, 4, method="auction").prices is None
    with pytest.raises(ValueError, match="exact, auction"):
        BalancedRouter(8, 4, method="greedy")


def test_hash_is_fixed_and_even():
    router = HashRouter(8)
    ids = torch.arange(8000)
    routing = router(torch.zeros(8000, 4), TokenInfo(token_id_T=ids))
    assert torch.equal(routing.expert_N, router.expert_of(ids))
    assert routing.expert_counts().min() > 900
    assert not torch.equal(routing.expert_N, HashRouter(8, seed=1).expert_of(ids))
    assert torch.equal(HashRouter(8, seed=10**12).expert_of(ids).unique(), torch.arange(8))


def test_padding_goes_nowhere_in_any_router():
    mask = torch.arange(30) % 3 != 0
    info = TokenInfo(
        is_real_T=mask, domain_T=torch.where(mask, 1, -100), token_id_T=torch.where(mask, torch.arange(30), -100)
    )
    routers = [TopKRouter(8, 5, 2), ExpertChoiceRouter(8, 5), BalancedRouter(8, 5), HashRouter(5), DomainRouter(5)]
    for router in routers:
        routing = router(X, info)
        assert mask[routing.token_N].all()
        statistics = statistics_of(routing)
        assert statistics.num_tokens == 20
        assert statistics.num_unrouted == 0 or isinstance(router, ExpertChoiceRouter)


def test_no_tokens_at_all():
    empty = torch.zeros(0, 8)
    info = TokenInfo(domain_T=torch.zeros(0, dtype=torch.int64), token_id_T=torch.zeros(0, dtype=torch.int64))
    for router in [TopKRouter(8, 5, 2), ExpertChoiceRouter(8, 5), BalancedRouter(8, 5), HashRouter(5), DomainRouter(5)]:
        assert router(empty, info).token_N.numel() == 0


def test_logits_are_float32_in_a_bfloat16_model():
    routing = TopKRouter(8, 5, 2).bfloat16()(X.bfloat16(), TokenInfo())
    assert routing.logits_TE.dtype == torch.float32


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: TopKRouter(8, 4, 5), "experts_per_token: got 5; allowed: 1 to 4"),
        (lambda: TopKRouter(8, 0, 1), "num_experts: got 0"),
        (lambda: TopKRouter(8, 4, 1, score="relu"), "softmax, sigmoid"),
        (lambda: ExpertChoiceRouter(8, 4, capacity_factor=9), "capacity_factor: got 9"),
        (lambda: DomainRouter(3)(X, TokenInfo()), "domain_T: got None"),
        (lambda: DomainRouter(3)(X, TokenInfo(domain_T=torch.full((30,), 3))), "allowed: 0 to 2"),
        (lambda: DomainRouter(3)(X, TokenInfo(domain_T=torch.full((30,), -1))), "ids from -1"),
        (lambda: DomainRouter(3)(X, TokenInfo(domain_T=torch.zeros(29, dtype=torch.int64))), "30 integers"),
        (lambda: TopKRouter(8, 4, 1)(X, TokenInfo(is_real_T=torch.ones(3))), r"allowed: \(30,\)"),
    ],
)
def test_bad_values_are_refused(build, words):
    with pytest.raises(ValueError, match=words):
        build()
