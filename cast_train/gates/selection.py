"""Scores per weight -> soft masks that keep N of every M consecutive scores, with exact gradients.

**Any N:M but 2:4**: p_i = sigmoid((s_i - theta) / tau), with the theta of each group for which its
p sum to N. Newton's method solves log(sum of 1 - p over the N largest) = log(sum of p over the
others), both sums of positive numbers: nearly linear where the group is decided, and steep
everywhere. By the implicit function, with v = p (1 - p),

    dL/ds_i = v_i (g_i - sum(v g) / sum(v)) / tau

Logits are taken relative to the middle between the N-th and the next largest score and clipped to
+-80, so v is above 1e-35: a decided group's gradient is 0 to any purpose, and never 0 / 0.

**2:4**: a soft mask is the marginal of a choice. Of all ways to keep N of the M weights of a group,
way A is drawn with probability proportional to prod_{i in A} x_i, x_i = exp(score_i / tau). Then

    p_i      = P(i is kept)         = x_i e_{N-1}(x without i) / e_N(x)
    P_ij     = P(i and j are kept)  = x_i x_j e_{N-2}(x without i, j) / e_N(x)
    dp_i/ds_j = (P_ij - p_i p_j) / tau          with P_ii = p_i

where e_k is the k-th elementary symmetric polynomial. The p of a group sum to exactly N, equal
scores give N/M, and tau -> 0 gives the hard mask. Nothing is drawn: the operator is deterministic.

Numbers that stay finite in 2:4:
  * e_N is never made by subtraction such as (E^2 - sum x^2) / 2, which loses every digit once one x
    dominates; it is a sum of products of positive numbers.
  * Scores are taken relative to the N-th largest of their group and clipped to +-40 tau. A weight
    that far from the border is decided to within exp(-40) = 4e-18, below fp32 and fp64 rounding of
    p, so clipping changes neither p nor its gradient, and exp cannot overflow: (e^40)^2 < 3.4e38.
  * In 2:4 the gradient is written with k_ij = p_i p_j - P_ij >= 0, for which the terms that cancel
    are removed by hand: k_ij = x_i x_j (x_u^2 + x_u x_v + x_v^2) / e_2^2, {u, v} the other
    two. As a row of P - p p^T sums to 0, dL/ds_i = sum_j k_ij (g_i - g_j) / tau. A decided group
    thus gets a gradient of 0 and not rounding noise over tau, which Adam would amplify.

2:4 works on the four columns of all groups as four contiguous planes, because a loop over a last
dimension of 4 is slow. Source: Chen and Liu, "Statistical applications of the Poisson-binomial and
conditional Bernoulli distributions", 1997.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cast_serve.sparsity.pattern import Pattern, PatternError, groups, hard_mask, patterns_of

CLIP = 40.0
WIDE_CLIP = 80.0
NEWTON_STEPS = 6


def soft_topk(scores: Tensor, n: int, m: int, tau: float) -> Tensor:
    """A soft mask of N of M: 2:4's is the marginal of a choice, others' a threshold's.

    Args:
        scores: fp32 or fp64 [..., K], K a multiple of m; any finite values.
        n: kept per group, 0 < n < m.
        m: group size.
        tau: temperature above 0, in units of the scores.

    Returns:
        p in [0, 1], the dtype and shape of scores; each group sums to n. Differentiable once.

    Raises:
        PatternError: if n and m are not a pattern or K is not a multiple of m.
        ValueError: if tau is not above 0.
    """
    if not 0 < n < m:
        raise PatternError(f"cannot keep {n} of {m}; N must be above 0 and below M")
    if not tau > 0:
        raise ValueError(f"tau is {tau}, but a temperature must be above 0")
    grouped = groups(scores, m)
    if (n, m) == (2, 4):
        return _SoftTwoOfFour.apply(grouped, tau).flatten(-2)
    return _SoftNOfM.apply(grouped, n, tau).flatten(-2)


def hard(scores: Tensor, n: int, m: int) -> Tensor:
    """The limit of `soft_topk` at tau 0: 1 for the N largest scores of a group, 0 for the others.

    Args:
        scores: floating point [..., K]; ties go to the lower column.

    Returns:
        the dtype and shape of scores, without gradient.

    Raises:
        PatternError: if K is not a multiple of m, or a score is NaN.
    """
    return hard_mask(scores.detach(), Pattern(n, m)).to(scores.dtype)


class _SoftTwoOfFour(torch.autograd.Function):
    """`soft_topk` for 2:4: grouped scores [..., K / 4, 4] -> p of the same shape."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, tau: float) -> Tensor:
        ctx.save_for_backward(scores)
        ctx.tau = tau
        a, b, c, d = _weights_of_four(scores, tau)
        ab, cd, a_or_b, c_or_d = a * b, c * d, a + b, c + d
        one_over_e2 = torch.addcmul(ab, a_or_b, c_or_d).add_(cd).reciprocal_()
        p = torch.empty_like(scores)
        for i, (x, own, others) in enumerate(
            ((a, ab, c_or_d), (b, ab, c_or_d), (c, cd, a_or_b), (d, cd, a_or_b))
        ):
            torch.mul(torch.addcmul(own, x, others), one_over_e2, out=p[..., i])
        return p

    @staticmethod
    def backward(ctx: Any, grad_p: Tensor) -> tuple[Tensor, None]:
        (scores,) = ctx.saved_tensors
        x = _weights_of_four(scores, ctx.tau)
        g = grad_p.unbind(-1)
        product = {(i, j): x[i] * x[j] for i in range(4) for j in range(i + 1, 4)}
        e2 = product[0, 1] + product[2, 3] + (x[0] + x[1]).mul_(x[2] + x[3])
        scale = e2.square_().mul_(ctx.tau).reciprocal_()
        grads = [torch.zeros_like(scale) for _ in range(4)]
        for i, j in product:
            u, v = (index for index in range(4) if index not in (i, j))
            term = torch.addcmul(product[u, v], x[u], x[u]).addcmul_(x[v], x[v])
            term.mul_(product[i, j]).mul_(scale).mul_(g[i] - g[j])
            grads[i].add_(term)
            grads[j].sub_(term)
        return torch.stack(grads, dim=-1), None


def _weights_of_four(scores: Tensor, tau: float) -> list[Tensor]:
    """x = exp((score - second largest) / tau), clipped: four contiguous planes [..., K / 4]."""
    planes = [plane.contiguous() for plane in scores.unbind(-1)]
    a, b, c, d = planes
    high, low = torch.maximum(a, b), torch.minimum(a, b)
    other_high, other_low = torch.maximum(c, d), torch.minimum(c, d)
    border = torch.minimum(high, other_high)
    torch.maximum(border, low, out=border)
    torch.maximum(border, other_low, out=border)
    return [(plane - border).mul_(1 / tau).clamp_(-CLIP, CLIP).exp_() for plane in planes]


class _SoftNOfM(torch.autograd.Function):
    """`soft_topk` for any N:M but 2:4: grouped scores [..., K / M, M] -> p of the same shape."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, n: int, tau: float) -> Tensor:
        largest = scores.sort(dim=-1, descending=True).values
        middle = (largest[..., n - 1 : n] + largest[..., n : n + 1]) / 2
        theta = _threshold(_relative(largest, middle, tau), n)
        logits = _relative(scores, middle, tau).sub_(theta)
        ctx.save_for_backward(logits)
        ctx.tau = tau
        return logits.sigmoid()

    @staticmethod
    def backward(ctx: Any, grad_p: Tensor) -> tuple[Tensor, None, None]:
        (logits,) = ctx.saved_tensors
        slope = logits.sigmoid().mul_((-logits).sigmoid_())  # p (1 - p) without cancellation
        mean = (slope * grad_p).sum(-1, keepdim=True) / slope.sum(-1, keepdim=True)
        return slope.mul_(grad_p - mean).div_(ctx.tau), None, None


def _relative(scores: Tensor, middle: Tensor, tau: float) -> Tensor:
    return (scores - middle).div_(tau).clamp_(-WIDE_CLIP, WIDE_CLIP)


def _threshold(logits: Tensor, n: int) -> Tensor:
    """theta [..., 1] for which the sigmoids of logits - theta sum to n.

    Args:
        logits: [..., M], in descending order, the border between the n-th and the next near 0.
    """
    theta = torch.zeros_like(logits[..., :1])
    for _ in range(NEWTON_STEPS):
        dropped = (theta - logits[..., :n]).sigmoid_()  # of the n largest
        kept = (logits[..., n:] - theta).sigmoid_()  # of the others
        lost, gained = dropped.sum(-1, keepdim=True), kept.sum(-1, keepdim=True)
        falling = (dropped.square_().sum(-1, keepdim=True).neg_() + lost) / lost
        rising = (kept.square_().sum(-1, keepdim=True).neg_() + gained) / gained
        theta = theta - (lost.log() - gained.log()) / (falling + rising)
    return theta


def gumbel_topk(scores: Tensor, n: int, m: int, tau: float, noise: float) -> Tensor:
    """A softmax over the C(M, N) patterns of a group, with Gumbel noise on each pattern's score.

    A pattern's score is the sum of its weights' scores, so without noise this is the marginal of a
    choice, as 2:4's `soft_topk` is, at the cost of C(M, N) numbers a group; with noise
    the groups try other patterns than their best.
    Source of the noise: Fang et al., "MaskLLM", 2024 (there each pattern has a logit of its own).

    Args:
        scores: fp32 or fp64 [..., K], K a multiple of m.
        tau: temperature above 0, in units of the scores.
        noise: factor of the Gumbel noise, in units of the scores; drawn from torch's generator.

    Returns:
        p in [0, 1], the dtype and shape of scores; each group sums to n.

    Raises:
        PatternError: if n and m are not a pattern, have too many, or K is not a multiple of m.
        ValueError: if tau is not above 0.
    """
    if not tau > 0:
        raise ValueError(f"tau is {tau}, but a temperature must be above 0")
    table = patterns_of(n, m).to(scores)
    pattern_scores = groups(scores, m) @ table.T
    if noise:
        uniform = torch.rand_like(pattern_scores).clamp_(1e-9, 1 - 1e-7)
        pattern_scores = pattern_scores - noise * (-uniform.log()).log()
    return (torch.softmax(pattern_scores / tau, dim=-1) @ table).flatten(-2)


def sigmoid_gates(scores: Tensor, tau: float) -> Tensor:
    """sigmoid(score / tau): no selection within a group; only the penalty pushes gates to 0.

    Args:
        scores: gate logits [..., K].
        tau: temperature above 0, relative: at 1 the gates are sigmoid(score).
    """
    return torch.sigmoid(scores / tau)


class MaskGenerator(nn.Module):
    """A small network, shared by all linears: features of a group of weights -> its gate logits.

    Its inputs are, for every weight of a group, log(|w| / the group's mean |w|) and the start's
    logit, and its output is added to the latter. The last layer starts at 0, so the first mask is
    the start's. About M * 3 * num_hidden numbers are trained in place of a logit per weight.
    """

    def __init__(self, m: int, num_hidden: int = 16) -> None:
        super().__init__()
        self.m = m
        self.inner = nn.Linear(2 * m, num_hidden)
        self.outer = nn.Linear(num_hidden, m)
        nn.init.zeros_(self.outer.weight)
        nn.init.zeros_(self.outer.bias)

    def forward(self, weight: Tensor, start: Tensor) -> Tensor:
        """Gate logits, fp32 [..., K].

        Args:
            weight: [..., K]; no gradient flows into it from here.
            start: gate logits at the start, fp32 [..., K].
        """
        size = groups(weight.detach().float().abs(), self.m)
        relative = (size / size.mean(-1, keepdim=True).clamp(min=1e-12)).clamp(min=1e-4).log()
        prior = groups(start, self.m)
        features = torch.cat((relative, prior - prior.mean(-1, keepdim=True)), dim=-1)
        # Recomputed in backward: the hidden layer is num_hidden / m times the weight.
        learnt = checkpoint(self._network, features, use_reentrant=False)
        return (prior + learnt).flatten(-2)

    def _network(self, features: Tensor) -> Tensor:
        return self.outer(nn.functional.gelu(self.inner(features)))
