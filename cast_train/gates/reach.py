"""Gates before training + TrainConfig -> how far they can move, and how far apart their groups are.

A logit whose gradient is always as large as its tensor's root mean square, with one sign, moves by
the learning rate a step (training/optimizer.py). The sum over the steps until the mask is exact is
the *reach*; a group changes its mask only if the last logit that it keeps and the first that it
drops cross.
"""

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from cast_serve.sparsity.pattern import groups
from cast_train.config import Gates, TrainConfig
from cast_train.gates.gating import Gate, LogitGate
from cast_train.gates.schedules import gate_rate_factor
from cast_train.gates.selection import hard

logger = logging.getLogger(__name__)

FEW_GAPS = 3  # of which gates with less reach hardly change the mask


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
def measure_reach(gates: Mapping[str, Gate], config: TrainConfig) -> Reach | None:
    """Measures how far the gates can move, and warns where that can hardly change the mask.

    Args:
        gates: as they start, by name; at least one.
        config: all settings.

    Returns:
        None: no logit is learnt by itself; fixed masks have none, and ``generator`` computes them.
    """
    if not isinstance(config, Gates) or config.selector == "generator":
        return None
    if config.first_exact_step == 0:
        return None
    factors = (gate_rate_factor(step, config) for step in range(config.first_exact_step))
    reach = config.gate_learning_rate * sum(factors)
    total_gap = 0.0
    num_groups = num_changeable = 0
    for gate in gates.values():
        assert isinstance(gate, LogitGate)
        logits, m = gate.ranks(), gate.pattern.m
        is_kept = hard(logits, gate.pattern.n, m).bool()
        least_kept = groups(logits.masked_fill(~is_kept, math.inf), m).amin(-1)
        most_dropped = groups(logits.masked_fill(is_kept, -math.inf), m).amax(-1)
        gap = least_kept - most_dropped
        total_gap += float(gap.sum(dtype=torch.float64))
        num_groups += gap.numel()
        num_changeable += int((gap <= 2 * reach).sum())
    found = Reach(reach, total_gap / num_groups, num_changeable / num_groups)
    if found.reach < FEW_GAPS * found.mean_gap:
        logger.warning(
            "gate logits move by about %.2g in all, but on average a group's lowest kept logit "
            "is %.2g above its highest dropped one: about %.1f%% of the groups can change, so "
            "this trains weights under the initial mask (%s); more steps, a higher hard_fraction "
            "or a higher gate_learning_rate let the mask change",
            found.reach,
            found.mean_gap,
            100 * found.changeable_share,
            config.start,
        )
    return found
