"""Gates before training + TrainConfig -> how far they can move, and how far apart their groups are.

A logit whose gradient is always as large as its tensor's root mean square, with one sign, moves by
the learning rate a step (training/optimizer.py). Over the steps until the mask is exact that is the
*reach*; a group changes its mask only if the last logit that it keeps and the first that it drops
cross.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from cast_serve.sparsity.pattern import groups
from cast_train.config import Gates
from cast_train.gates.gating import Gate, LogitGate
from cast_train.gates.selection import hard


@dataclass(frozen=True)
class Reach:
    """What bounds the flips of a run.

    Attributes:
        reach: how far such a logit moves in all.
        mean_gap: mean over the groups of the N-th largest logit minus the next one.
        changeable_share: groups whose gap is at most twice the reach, over all groups: in them such
            logits can cross, as one falls and the other rises.
    """

    reach: float
    mean_gap: float
    changeable_share: float


@torch.no_grad()
def measure_reach(gates: Mapping[str, Gate], config: Gates) -> Reach:
    """Measures gates whose logits are learnt (selectors other than ``generator``).

    Args:
        gates: as they start, by name; at least one.
    """
    reach = config.gate_learning_rate * config.first_exact_step
    total_gap = 0.0
    num_groups = num_changeable = 0
    for gate in gates.values():
        assert isinstance(gate, LogitGate)
        rows, m = gate.rows(), gate.pattern.m
        is_kept = hard(rows, gate.pattern.n, m).bool()
        least_kept = groups(rows.masked_fill(~is_kept, math.inf), m).amin(-1)
        most_dropped = groups(rows.masked_fill(is_kept, -math.inf), m).amax(-1)
        gap = least_kept - most_dropped
        total_gap += float(gap.sum(dtype=torch.float64))
        num_groups += gap.numel()
        num_changeable += int((gap <= 2 * reach).sum())
    return Reach(reach, total_gap / num_groups, num_changeable / num_groups)
