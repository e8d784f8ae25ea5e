"""Gates of N:64 under a share of zeros -> how many of 64 weights each unit of linears keeps.

A *unit* is the linears that read the same inputs; vLLM merges them, so they share N. Its N is
learnt as a real number, rounded in every forward. By the implicit function that gives selection.py
its gradient, one more weight in each group changes the loss by

    dL/dN = sum over groups of sum(v g) / sum(v)            v = p (1 - p), g the gradient by p

which averages over all groups of a unit. The units compete for one budget: with their sizes s and
the benefit of a weight b = -dL/dN / s,

    N += lr (b - mean b) / rms(b - mean b)                  mean and rms weighted by s

and the sum of s N stays. Where all benefits are equal, no exchange lowers the loss. N starts from
what the costs say (allocate.py), and is a multiple of 4 once the gates are hardened.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from cast_serve.sparsity.pattern import KEPT_STEP, LEAST_KEPT, MOST_KEPT, WORD
from cast_train.gates.gating import Gate, LogitGate


def attach(gates: Mapping[str, Gate], units: Sequence[Sequence[str]]) -> None:
    """Gives the gates of each unit one N to learn.

    Args:
        gates: LogitGates by name; those of a unit have the same N.
        units: the names of each.
    """
    for names in units:
        owner, *others = [gates[name] for name in names]
        assert isinstance(owner, LogitGate)
        owner.learn_n()
        for gate in others:
            assert isinstance(gate, LogitGate)
            gate.share_n(owner)


def learnt_units(gates: Mapping[str, Gate]) -> list[tuple[Tensor, int]]:
    """Each unit's N, an fp32 scalar, and its number of weights; empty if N is not learnt."""
    units: dict[int, tuple[Tensor, int]] = {}
    for gate in gates.values():
        if isinstance(gate, LogitGate) and (n := gate.learnt_n) is not None:
            _, size = units.get(id(n), (n, 0))
            units[id(n)] = n, size + gate.logits.numel()
    return list(units.values())


@torch.no_grad()
def exchange(each_n: Sequence[Tensor], sizes: Sequence[int], benefits: Tensor, rate: float) -> None:
    """Moves N towards the units that benefit most; N stays from LEAST_KEPT to MOST_KEPT.

    Args:
        each_n: N of each unit, fp32 scalars, changed in place.
        sizes: the units' numbers of weights.
        benefits: how much one more weight of each lowers the loss, fp64 [num_units].
        rate: how far N moves where the benefit lies one root mean square from the mean.
    """
    shares = torch.tensor(sizes, dtype=torch.float64) / sum(sizes)
    excess = benefits - shares @ benefits
    spread = (shares @ excess.square()).sqrt()
    if not spread > 0:
        return
    before = torch.tensor([n.item() for n in each_n], dtype=torch.float64)
    wanted = before + rate * excess / spread
    low, high = -float(WORD), float(WORD)  # of a shift that keeps the sum within the limits
    for _ in range(60):
        shift = (low + high) / 2
        is_less = shares @ (wanted + shift).clamp(LEAST_KEPT, MOST_KEPT) < shares @ before
        low, high = (shift, high) if is_less else (low, shift)
    for n, found in zip(each_n, (wanted + low).clamp(LEAST_KEPT, MOST_KEPT).tolist(), strict=True):
        n.fill_(found)


@torch.no_grad()
def harden(gates: Mapping[str, Gate]) -> None:
    """Rounds each N to a multiple of KEPT_STEP; the sum of s N does not rise.

    All are rounded down; what that leaves of the budget rounds up those that lost most.
    """
    units = learnt_units(gates)
    lost = [n.item() % KEPT_STEP for n, _ in units]
    left = sum(size * part for (_, size), part in zip(units, lost, strict=True))
    for number in sorted(range(len(units)), key=lambda number: -lost[number]):
        n, size = units[number]
        n.sub_(lost[number])
        if lost[number] and left >= KEPT_STEP * size:
            n.add_(KEPT_STEP)
            left -= KEPT_STEP * size
