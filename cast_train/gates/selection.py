"""Scores per weight -> soft masks that keep N of every M consecutive scores, with exact gradients.

    p_i = sigmoid((s_i - theta) / tau),    theta of each group such that its p sum to N

By the implicit function, with v = p (1 - p) and g the gradient by p,

    dL/ds_i = v_i (g_i - sum(v g) / sum(v)) / tau            dL/dN = sum(v g) / sum(v)

Equal scores give N/M, and tau -> 0 gives the hard mask. Nothing is drawn: the operator is
deterministic. Theta is where log(sum of 1 - p over the N largest) = log(sum of p over the others),
both sums of positive numbers: nearly linear where the group is decided, steep everywhere, and so
found by a few steps of Newton's method.

Scores are taken relative to the middle between the N-th and the next largest and clipped to +-80
tau, so v is above 1e-35: a decided group's gradient is 0 to any purpose, and never 0 / 0.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cast_serve.sparsity.pattern import (
    Pattern,
    PatternError,
    groups,
    hard_mask,
    patterns_of,
    slabs,
    sort_columns,
)

CLIP = 80.0
NEWTON_STEPS = 6  # at most
NEWTON_DONE = 1e-3  # of theta, in tau: the next step would be about its square


def soft_topk(scores: Tensor, n: int, m: int, tau: float, learnt_n: Tensor | None = None) -> Tensor:
    """A soft mask of N of M.

    Args:
        scores: fp32 or fp64 [..., K], K a multiple of m; any finite values.
        n: kept per group, 0 < n < m.
        m: group size.
        tau: temperature above 0, in units of the scores.
        learnt_n: a scalar that stands for n where N is learnt; it gets the gradient by n, summed
            over the groups.

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
    return _SoftTopK.apply(groups(scores, m), n, tau, learnt_n).flatten(-2)


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


class _SoftTopK(torch.autograd.Function):
    """`soft_topk` of grouped scores [..., K / M, M] -> p of the same shape.

    For the backward pass each group keeps two numbers: the logits are made of the scores again.
    """

    @staticmethod
    def forward(ctx: Any, scores: Tensor, n: int, tau: float, learnt_n: Tensor | None) -> Tensor:
        p = torch.empty_like(scores, memory_format=torch.contiguous_format)
        middles, thetas = [], []
        for rows, found in slabs(scores, p):
            # A loop over a last dimension of 4 is slow. A copy even of one group, which lies alike.
            columns = rows.t().clone(memory_format=torch.contiguous_format)
            ascending = sort_columns(columns.clone())
            middle = (ascending[-n] + ascending[-n - 1]) / 2
            theta = _threshold(_relative(ascending, middle, tau), n)
            found.copy_(_relative(columns, middle, tau).sub_(theta).sigmoid_().t())
            middles.append(middle)
            thetas.append(theta)
        border = torch.stack([torch.cat(middles), torch.cat(thetas)])
        ctx.save_for_backward(scores, border)
        ctx.tau = tau
        return p

    @staticmethod
    def backward(ctx: Any, grad_p: Tensor) -> tuple[Tensor, None, None, Tensor | None]:
        scores, border = ctx.saved_tensors
        middle, theta = border.view(2, *scores.shape[:-1], 1)
        logits = _relative(scores.clone(), middle, ctx.tau).sub_(theta)
        slope = logits.sigmoid().mul_((-logits).sigmoid_())  # p (1 - p) without cancellation
        mean = (slope * grad_p).sum(-1, keepdim=True) / slope.sum(-1, keepdim=True)
        by_n = mean.sum() if ctx.needs_input_grad[3] else None
        return slope.mul_(grad_p - mean).div_(ctx.tau), None, None, by_n


def _relative(scores: Tensor, middle: Tensor, tau: float) -> Tensor:
    """Logits in place of scores, whose memory they take; without theta."""
    return scores.sub_(middle).div_(tau).clamp_(-CLIP, CLIP)


def _threshold(ascending: Tensor, n: int) -> Tensor:
    """theta [groups] for which the sigmoids of logits - theta sum to n.

    Args:
        ascending: logits [M, groups], sorted; the border below the n largest lies near 0.
    """
    others, largest = ascending[:-n], ascending[-n:]
    shares = torch.empty_like(ascending)
    kept, dropped = shares[:-n], shares[-n:]  # of the others, of the n largest
    theta = torch.zeros_like(ascending[0])
    for _ in range(NEWTON_STEPS):
        torch.sub(others, theta, out=kept)
        torch.sub(theta, largest, out=dropped)
        shares.sigmoid_()
        gained, lost = kept.sum(0), dropped.sum(0)
        shares.square_()
        # The slopes of their logarithms by theta.
        rising = (gained - kept.sum(0)) / gained
        falling = (lost - dropped.sum(0)) / lost
        step = (gained.log_() - lost.log_()) / (rising + falling)
        theta += step
        if step.abs().max() < NEWTON_DONE:
            break
    return theta


def gumbel_topk(scores: Tensor, n: int, m: int, tau: float, noise: float) -> Tensor:
    """A softmax over the C(M, N) patterns of a group, with Gumbel noise on each pattern's score.

    A pattern's score is the sum of its weights' scores, so without noise this is the chance that a
    weight is kept, at the cost of C(M, N) numbers a group; with noise the groups try other
    patterns than their best.
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
