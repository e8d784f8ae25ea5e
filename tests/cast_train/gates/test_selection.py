import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cast_serve.sparsity.pattern import PatternError
from cast_train.gates.selection import MaskGenerator, gumbel_topk, hard, sigmoid_gates, soft_topk

PATTERNS = [(2, 4), (1, 4), (3, 4), (2, 3), (1, 2), (4, 8), (2, 8), (8, 16), (32, 64), (40, 64)]
patterns = st.sampled_from(PATTERNS)
taus = st.sampled_from([1e-4, 1e-2, 0.5, 1.0, 10.0])
seeds = st.integers(0, 2**31 - 1)


def random_scores(
    seed: int, m: int, scale: float = 1.0, dtype: torch.dtype = torch.float64
) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(3, 4 * m, generator=generator, dtype=torch.float64) * scale).to(dtype)


def by_enumeration(scores: Tensor, n: int, m: int, tau: float) -> Tensor:
    logits = scores.unflatten(-1, (-1, m)) / tau
    ways = list(itertools.combinations(range(m), n))
    chances = torch.stack([logits[..., list(way)].sum(-1) for way in ways]).softmax(0)
    p = torch.zeros_like(logits)
    for way, chance in zip(ways, chances, strict=True):
        for i in way:
            p[..., i] += chance
    return p.flatten(-2)


@given(patterns, taus, seeds, st.sampled_from([1e-3, 1.0, 1e4]))
@settings(deadline=None, max_examples=60)
def test_a_group_sums_to_n_within_0_and_1(pattern, tau, seed, scale):
    n, m = pattern
    p = soft_topk(random_scores(seed, m, scale, torch.float32), n, m, tau)
    assert p.min() >= 0
    assert p.max() <= 1 + 1e-6
    torch.testing.assert_close(
        p.unflatten(-1, (-1, m)).sum(-1), torch.full((3, 4), float(n)), rtol=1e-5, atol=1e-5
    )


@given(patterns, taus, seeds)
@settings(deadline=None, max_examples=60)
def test_it_is_a_threshold_on_the_scores_of_a_group(pattern, tau, seed):
    n, m = pattern
    scores = random_scores(seed, m)
    p = soft_topk(scores, n, m, tau)
    theta = (scores - tau * p.logit()).unflatten(-1, (-1, m))
    undecided = ((p > 1e-6) & (p < 1 - 1e-6)).unflatten(-1, (-1, m))
    span = theta.masked_fill(~undecided, -torch.inf).amax(-1) - theta.masked_fill(
        ~undecided, torch.inf
    ).amin(-1)
    assert (span <= 1e-6 * max(tau, 1.0)).all()
    torch.testing.assert_close(hard(p, n, m), hard(scores, n, m))


@pytest.mark.parametrize(("n", "m"), PATTERNS)
def test_its_gradient_is_that_of_finite_differences(n, m):
    scores = random_scores(0, m).requires_grad_()
    assert torch.autograd.gradcheck(lambda s: soft_topk(s, n, m, 0.7), scores)


@pytest.mark.parametrize(("n", "m"), PATTERNS)
def test_it_is_finite_at_tau_1e_4_and_scores_of_1e4(n, m):
    scores = random_scores(1, m, 1e4, torch.float32).requires_grad_()
    p = soft_topk(scores, n, m, 1e-4)
    (p * torch.arange(p.shape[-1])).sum().backward()
    torch.testing.assert_close(p, hard(scores, n, m))
    assert scores.grad is not None
    assert torch.isfinite(scores.grad).all()


def test_the_scores_of_a_single_group_stay_as_they_are():
    scores = torch.tensor([[3.0, 2.0, -2.0, -3.0]])
    soft_topk(scores, 2, 4, 0.1)
    assert scores.tolist() == [[3.0, 2.0, -2.0, -3.0]]


@pytest.mark.parametrize("n", [1, 2])
def test_a_decided_group_gets_no_rounding_noise_as_gradient(n):
    scores = torch.tensor([[3.0, 2.0, -2.0, -3.0]]).requires_grad_()
    soft_topk(scores, n, 4, 1e-3).backward(torch.tensor([[0.1, 0.2, 0.3, 0.7]]))
    assert scores.grad is not None
    assert scores.grad.abs().max() < 1e-12


@pytest.mark.parametrize(("n", "m"), PATTERNS)
@pytest.mark.parametrize("tau", [1e-4, 1.0])
def test_equal_scores_give_n_over_m(n, m, tau):
    p = soft_topk(torch.full((2, 2 * m), 4.0), n, m, tau)
    torch.testing.assert_close(p, torch.full_like(p, n / m))


@given(patterns, seeds)
@settings(deadline=None, max_examples=30)
def test_hard_keeps_the_n_largest(pattern, seed):
    n, m = pattern
    scores = random_scores(seed, m)
    mask = hard(scores, n, m).bool()
    grouped, kept = scores.unflatten(-1, (-1, m)), mask.unflatten(-1, (-1, m))
    assert (kept.sum(-1) == n).all()
    lowest_kept = grouped.masked_fill(~kept, torch.inf).amin(-1)
    assert (lowest_kept > grouped.masked_fill(kept, -torch.inf).amax(-1)).all()


def test_wrong_use_is_refused():
    with pytest.raises(ValueError, match="tau is 0"):
        soft_topk(torch.zeros(1, 4), 2, 4, 0)
    with pytest.raises(PatternError, match="4 of 4"):
        soft_topk(torch.zeros(1, 4), 4, 4, 1)
    with pytest.raises(PatternError, match="6 is not a multiple of 4"):
        soft_topk(torch.zeros(1, 6), 2, 4, 1)


@given(st.sampled_from(PATTERNS[:7]), taus, seeds)
@settings(deadline=None, max_examples=40)
def test_gumbel_without_noise_is_the_marginal_over_all_ways_to_choose(pattern, tau, seed):
    n, m = pattern
    scores = random_scores(seed, m)
    torch.testing.assert_close(
        gumbel_topk(scores, n, m, tau, 0.0),
        by_enumeration(scores, n, m, tau),
        rtol=1e-8,
        atol=1e-10,
    )


def test_gumbel_noise_draws_patterns_by_their_chance():
    scores = torch.tensor([[1.0, 0.5, 0.0, -0.5]]).repeat(20_000, 1)
    torch.manual_seed(0)
    drawn = gumbel_topk(scores, 2, 4, 1e-3, 1.0)  # cold: one pattern each
    torch.testing.assert_close(drawn.sum(-1), torch.full((20_000,), 2.0))
    chance = by_enumeration(scores[0], 2, 4, 1.0)
    torch.testing.assert_close(drawn.mean(0), chance, rtol=0, atol=0.015)
    torch.manual_seed(0)
    assert torch.equal(drawn, gumbel_topk(scores, 2, 4, 1e-3, 1.0))


def test_gumbel_refuses_too_many_patterns():
    with pytest.raises(PatternError, match="8:16 has 12870 patterns .* up to 70"):
        gumbel_topk(torch.zeros(1, 16), 8, 16, 1.0, 0.0)
    with pytest.raises(ValueError, match="tau is 0"):
        gumbel_topk(torch.zeros(1, 4), 2, 4, 0, 0.0)


def test_sigmoid_gates_need_no_group():
    scores = torch.tensor([4.0, -4.0])
    torch.testing.assert_close(sigmoid_gates(scores, 1.0), torch.sigmoid(scores))
    torch.testing.assert_close(sigmoid_gates(scores, 1e-3), torch.tensor([1.0, 0.0]))


def test_the_generator_starts_at_the_start_and_learns_from_sizes():
    torch.manual_seed(0)
    generator = MaskGenerator(4)
    weight, start = torch.randn(8, 16), torch.randn(8, 16)
    torch.testing.assert_close(generator(weight, start), start)
    optimizer = torch.optim.Adam(generator.parameters(), lr=1e-2)
    for _ in range(300):  # it can learn to keep the smallest weights
        optimizer.zero_grad()
        kept = soft_topk(generator(weight, torch.zeros(8, 16)), 2, 4, 0.5)
        (kept * weight.abs()).sum().backward()
        optimizer.step()
    learnt = hard(generator(weight, torch.zeros(8, 16)), 2, 4)
    assert (learnt == hard(-weight.abs(), 2, 4)).float().mean() > 0.9  # by chance: 0.5
