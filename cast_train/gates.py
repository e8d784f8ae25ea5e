"""A dense model -> the same model with a gate beside every target weight, and back.

A target linear with weight W [out_features, in_features] has gate logits L of the same shape:

    s   = sigmoid(L)         gates in (0, 1), near 1 at the start
    p   = selection(L)       soft mask; sigmoid is monotone, so the order of logits is that of gates
    s'  = (1 - a) + a p      blend a: 0 at step 0, so the model starts as the dense one
    W'' = W * s'             what the linear multiplies with

A linear whose weight is stored transposed, [in_features, out_features] (GPT-2's Conv1D), keeps its
gate logits transposed too; groups always run along in_features.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from cast_serve.nm import Pattern, groups
from cast_train.schedules import Phase
from cast_train.selection import hard, soft_topk

DENSE = Phase(blend=0.0, tau=1.0, penalty_weight=0.0, is_hard=False)
# sigmoid(4) = 0.98: near 1, and still with a gradient.
START_LOGIT = 4.0


class Gate(nn.Module):
    """The parametrization W -> W'' of one linear.

    Attributes:
        logits: gate logits, fp32, the shape of the weight.
        phase: what `forward` does; set before each step.
        penalty: of the last forward, see `sparsity_penalty`; None where lambda is 0.
    """

    def __init__(self, logits: Tensor, pattern: Pattern, is_transposed: bool) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits.float().contiguous())
        self.pattern = pattern
        self.is_transposed = is_transposed
        self.phase = DENSE
        self.penalty: Tensor | None = None
        self._mask: Tensor | None = None

    def rows(self) -> Tensor:
        """The logits [out_features, in_features], however the weight is stored."""
        return self.logits.t() if self.is_transposed else self.logits

    def mask(self) -> Tensor:
        """The exact N:M mask as 0 and 1, in the weight's layout; kept until the phase changes."""
        if self._mask is None:
            mask = hard(self.rows(), self.pattern.n, self.pattern.m)
            self._mask = (mask.t() if self.is_transposed else mask).contiguous()
        return self._mask

    def set_phase(self, phase: Phase) -> None:
        if not (phase.is_hard and self.phase.is_hard):
            self._mask = None
        self.phase = phase
        self.penalty = None

    def forward(self, weight: Tensor) -> Tensor:
        if self.phase.blend == 0.0 and not self.phase.is_hard:
            return weight
        if self.phase.is_hard:
            return weight * self.mask().to(weight.dtype)
        kept = soft_topk(self.rows(), self.pattern.n, self.pattern.m, self.phase.tau)
        if self.phase.penalty_weight:
            self.penalty = sparsity_penalty(kept, self.pattern)
        kept = kept.t() if self.is_transposed else kept
        return weight * (kept * self.phase.blend + (1 - self.phase.blend)).to(weight.dtype)


def is_transposed(linear: nn.Module) -> bool:
    """Whether the weight is stored [in_features, out_features], as in GPT-2's Conv1D."""
    return type(linear).__name__ in ("Conv1D", "ParametrizedConv1D")


def sparsity_penalty(gates: Tensor, pattern: Pattern) -> Tensor:
    """L_sparsity: the sum of the M - N smallest gates of a group, averaged over the groups.

    The mean, and not the sum over groups, keeps lambda's meaning the same for models of any size.

    Args:
        gates: gates or soft mask in [0, 1], [..., K].

    Returns:
        scalar from 0 (exactly N:M) to M - N (every gate open).

    Raises:
        PatternError: if K is no multiple of M.
    """
    smallest = groups(gates, pattern.m).topk(pattern.m - pattern.n, dim=-1, largest=False).values
    return smallest.sum(-1).mean()


def attach(
    targets: Mapping[str, nn.Module], pattern: Pattern, scores: Mapping[str, Tensor] | None = None
) -> dict[str, Gate]:
    """Puts a gate beside every weight of the targets.

    Args:
        targets: linears by name.
        pattern: N:M.
        scores: importance of each weight, not negative, [out_features, in_features] by name: within
            a group the logits start in their order, apart by score over the group's mean score.
            None: all logits start equal, and training alone decides.

    Returns:
        the gates by name, in the targets' order.
    """
    gates = {}
    for name, linear in targets.items():
        transposed = is_transposed(linear)
        logits = torch.full_like(linear.weight, START_LOGIT, dtype=torch.float32)
        if scores is not None:
            spread = _spread(scores[name], pattern.m)
            logits += spread.t() if transposed else spread
        gates[name] = Gate(logits, pattern, transposed)
        parametrize.register_parametrization(linear, "weight", gates[name])
    return gates


def _spread(scores: Tensor, m: int) -> Tensor:
    """Scores relative to their group's mean, less 1: around 0 whatever the layer's scale."""
    grouped = groups(scores.float(), m)
    mean = grouped.mean(-1, keepdim=True)
    return torch.where(mean > 0, grouped / mean - 1, 0.0).flatten(-2)


def detach(targets: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """Takes the gates off again: the linears compute with their own weights W, unmasked.

    Returns:
        gate logits by name, fp32, the shape of the weights.
    """
    logits = {}
    for name, linear in targets.items():
        logits[name] = linear.parametrizations.weight[0].logits.detach()
        parametrize.remove_parametrizations(linear, "weight", leave_parametrized=False)
    return logits


def set_phase(gates: Mapping[str, Gate], phase: Phase) -> None:
    for gate in gates.values():
        gate.set_phase(phase)


def penalty(gates: Mapping[str, Gate]) -> Tensor | None:
    """The penalties of the last forward, averaged over the targets; None if there are none."""
    found = [gate.penalty for gate in gates.values() if gate.penalty is not None]
    return torch.stack(found).mean() if found else None


@dataclass(frozen=True)
class GateStatistics:
    """Where the gates stand.

    Attributes:
        undecided_share: weights with a soft mask from 0.05 to 0.95, over all target weights.
        flipped_share: groups' kept places taken by a weight that the start would have dropped.
    """

    undecided_share: float
    flipped_share: float


@torch.no_grad()
def statistics(
    gates: Mapping[str, Gate], tau: float, start: Mapping[str, Tensor] | None = None
) -> GateStatistics:
    """Measures the gates at a temperature.

    Args:
        start: bool masks by name, in the weights' layout, to count flips against; None: no flips.
    """
    num_weights = num_undecided = num_flipped = num_kept = 0
    for name, gate in gates.items():
        soft = soft_topk(gate.rows(), gate.pattern.n, gate.pattern.m, tau)
        num_weights += soft.numel()
        num_undecided += int(((soft > 0.05) & (soft < 0.95)).sum())
        if start is not None:
            num_flipped += int((gate.mask().bool() & ~start[name]).sum())
            num_kept += int(start[name].sum())
    return GateStatistics(num_undecided / num_weights, num_flipped / max(num_kept, 1))
