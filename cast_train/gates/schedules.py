"""A training step's number -> lambda, tau, blend, and whether mask and integers are exact by then.

blend   0 ------ ramp ------ 1 ----------------------------------   0: dense, 1: the mask alone
tau     tau_start --- geometric --- tau_end ---------------------
lambda  0 ------------- ramp ------------------- penalty_weight     0 once hard
hard    no ----------------------------- yes --------------------   gates frozen, weights trained
int8/4  no -------------------------------------------- yes -----   quantised forward, if asked for
noise   gumbel_noise ---- linear ---- 0 -------------------------   of the gumbel selector
"""

import math
from dataclasses import dataclass

from cast_train.config import Gates, TrainConfig

MOMENTUM = 0.9  # of the mean of a logit's gradients, beta1 in training/optimizer.py


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
        is_quantized: whether, under the exact mask, the forward is quantised (quantizing.py).
    """

    blend: float
    tau: float
    penalty_weight: float
    is_hard: bool
    noise: float = 0.0
    relative_tau: float = 1.0
    is_quantized: bool = False


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
    """What the weights' learning rate is multiplied by: a warm-up, then half a cosine to 0.

    Where weights wait for the mask it is 0 until that is exact; the schedule has the steps after.
    Source: transformers' get_cosine_schedule_with_warmup.

    Args:
        step: from 0; step = steps is the end of training.
    """
    first = config.first_exact_step if config.waits else 0
    if step < first:
        return 0.0
    step, num_steps = step - first, config.steps - first
    warmup = round(config.warmup_fraction * num_steps)
    if step < warmup:
        return step / warmup
    return 1 - ramp("cosine", (step - warmup) / max(num_steps - warmup, 1))


def gate_rate_factor(step: int, config: TrainConfig) -> float:
    """What the gates' learning rate is multiplied by, from step 0; 0 once the mask is exact.

    It warms up with the mean of the gradients: the first few batches are weak evidence, and would
    move a logit farthest where a gradient happens to be large.
    """
    return 0.0 if phase_at(step, config).is_hard else 1 - MOMENTUM ** (step + 1)


def phase_at(step: int, config: TrainConfig) -> Phase:
    """The phase of a step, from 0; step = steps is the end of training.

    The last step is always hard, whatever the fractions round to, except with ``adams``, whose
    forward is dense to the end, and with ``dense``.
    """
    is_hard = step >= config.first_exact_step
    first = config.first_quantized_step
    is_quantized = first is not None and step >= first
    if not isinstance(config, Gates):
        return Phase(1.0, 1.0, penalty_weight=0.0, is_hard=is_hard, is_quantized=is_quantized)
    if is_hard:
        relative_tau = config.tau_end / config.tau_start
        return Phase(
            1.0, config.tau_end, 0.0, is_hard, relative_tau=relative_tau, is_quantized=is_quantized
        )

    def progress(fraction: float) -> float:
        return step / (fraction * config.steps) if fraction > 0 else 1.0

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
