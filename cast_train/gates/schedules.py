"""A training step's number -> lambda, tau, blend, and whether the mask is exact by then.

blend   0 ------ ramp ------ 1 ----------------------------------   0: dense, 1: the mask alone
tau     tau_start --- geometric --- tau_end ---------------------
lambda  0 ------------- ramp ------------------- penalty_weight     0 once hard
hard    no ----------------------------- yes --------------------   gates frozen, weights trained
noise   gumbel_noise ---- linear ---- 0 -------------------------   of the gumbel selector
"""

import math
from dataclasses import dataclass

from cast_train.config import TrainConfig


@dataclass(frozen=True)
class Phase:
    """What the gates do in one step.

    Attributes:
        blend: a in s' = (1 - a) + a p; 0 computes what the dense model computes.
        tau: temperature of the selection, in logits.
        penalty_weight: lambda.
        is_hard: whether p is the exact mask.
        noise: of the gumbel selector, in logits.
        relative_tau: tau over its value at step 0.
    """

    blend: float
    tau: float
    penalty_weight: float
    is_hard: bool
    noise: float = 0.0
    relative_tau: float = 1.0


def ramp(shape: str, progress: float) -> float:
    """From 0 at progress 0 to 1 at progress 1 and after.

    Args:
        shape: ``constant`` (1 all along), ``linear`` or ``cosine``.
        progress: 0 or more.

    Raises:
        ValueError: if the shape does not exist.
    """
    progress = min(max(progress, 0.0), 1.0)
    if shape == "constant":
        return 1.0
    if shape == "linear":
        return progress
    if shape == "cosine":
        return (1 - math.cos(math.pi * progress)) / 2
    raise ValueError(f"ramp {shape!r} does not exist; choose from constant, linear, cosine")


def learning_rate_factor(step: int, config: TrainConfig) -> float:
    """What the learning rates of a step, from 0, are multiplied by: a warm-up, then half a cosine.

    Source: transformers' get_cosine_schedule_with_warmup, which the training uses.
    """
    warmup = round(config.warmup_fraction * config.steps)
    if step < warmup:
        return step / warmup
    return 1 - ramp("cosine", (step - warmup) / max(config.steps - warmup, 1))


def phase_at(step: int, config: TrainConfig) -> Phase:
    """The phase of a step, from 0; step = steps is the end of training.

    The last step is always hard, whatever the fractions round to, except with ``adams``, whose
    forward is dense to the end, and with ``dense``.
    """

    def progress(fraction: float) -> float:
        return step / (fraction * config.steps) if fraction > 0 else 1.0

    if config.method in ("adams", "dense"):
        is_hard = step >= config.steps
    else:
        is_hard = step >= config.hard_fraction * config.steps or step >= config.steps - 1
    if is_hard:
        return Phase(
            blend=1.0,
            tau=config.tau_end,
            penalty_weight=0.0,
            is_hard=True,
            relative_tau=config.tau_end / config.tau_start,
        )
    cooling = min(progress(config.tau_end_fraction), 1.0)
    relative_tau = (config.tau_end / config.tau_start) ** cooling
    return Phase(
        blend=ramp(config.blend_ramp, progress(config.blend_end_fraction)),
        tau=config.tau_start * relative_tau,
        penalty_weight=config.penalty_weight
        * ramp(config.penalty_ramp, progress(config.hard_fraction)),
        is_hard=False,
        noise=config.gumbel_noise * (1 - cooling),
        relative_tau=relative_tau,
    )
