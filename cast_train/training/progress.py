"""A run's steps -> the progress bar, and other reporters of its figures."""

import logging
from importlib import metadata
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm
from transformers import TrainerCallback
from transformers.trainer_callback import ProgressCallback

from cast_serve.errors import UsageError
from cast_train.config import Gates, TrainConfig
from cast_train.gates.schedules import phase_at

logger = logging.getLogger(__name__)


class Progress(ProgressCallback):
    """Trainer's bar: steps, time left, tokens/s and the loss beside it, in place of a line a step.

    Args:
        config: all settings.
        tokens: of one step, over all processes.
        loss: what the loss is, in words; said once.
    """

    def __init__(self, config: TrainConfig, tokens: int, loss: str) -> None:
        super().__init__()
        self.config = config
        self.tokens = tokens
        self.loss = loss

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Steps before the checkpoint that it resumes from are not this process's progress."""
        if state.is_world_process_zero:
            logger.info("%s", self.loss)
            if words := quantized_in_words(self.config):
                logger.info("%s", words)
            self.training_bar = tqdm(
                total=state.max_steps,
                initial=state.global_step,
                desc="training",
                unit="step",
                dynamic_ncols=True,
            )
        self.current_step = state.global_step

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if state.is_world_process_zero and self.training_bar is not None and "loss" in logs:
            figures = {"loss": f"{float(logs['loss']):.3f}"}
            if rate := self.training_bar.format_dict["rate"]:
                figures["tokens/s"] = f"{rate * self.tokens:,.0f}"
            is_quantized = phase_at(state.global_step - 1, self.config).is_quantized
            if is_quantized and self.config.quantization is not None:
                figures["weights"] = self.config.quantization.values
            self.training_bar.set_postfix(figures)


def loss_in_words(config: TrainConfig, has_teacher: bool) -> str:
    """What the loss of a step is made of, with the settings that weigh its parts."""
    share = config.distillation_weight if has_teacher else 0.0
    parts = [] if share == 1 else [f"{1 - share:.3g} x cross-entropy of the next token"]
    if share:
        teacher = "KL divergence from the teacher's prediction to the model's"
        if config.distillation_temperature != 1:
            teacher += f" at temperature {config.distillation_temperature:g}"
        parts.append(f"{share:.3g} x {teacher}")
    if has_teacher and config.hidden_states_weight:
        distance = "relative squared distance of the hidden states from the teacher's"
        parts.append(f"{config.hidden_states_weight:g} x {distance}")
    if isinstance(config, Gates) and config.penalty_weight and config.hard_fraction:
        ramp = "" if config.penalty_ramp == "constant" else "up to "
        penalty = "sparsity penalty until the mask is exact"
        parts.append(f"{ramp}{config.penalty_weight:g} x {penalty}")
    return f"loss of a step: {' + '.join(parts)}"


def quantized_in_words(config: TrainConfig) -> str | None:
    """Which steps have a quantised forward, and in how many bits; None if none has."""
    if (quantization := config.quantization) is None or config.first_quantized_step is None:
        return None
    groups = f" with scale groups of {quantization.group}" if quantization.group else ""
    return (
        f"from step {config.first_quantized_step + 1} of {config.steps} on, weights are "
        f"{quantization.values}{groups} and activations int8"
    )


def check_reporter(name: str, asked_by: str) -> None:
    """Refuses a reporter whose package is not installed.

    Args:
        name: as `report_to` has it.
        asked_by: the setting or flag, for the message.

    Raises:
        UsageError: naming the package.
    """
    package = name.replace("_", "-")
    try:
        if name != "none":
            metadata.distribution(package)
    except metadata.PackageNotFoundError:
        raise UsageError(
            f"{asked_by} needs the package {package}, which is not installed; "
            f"run pip install {package}"
        ) from None


def tensorboard(folder: Path) -> TrainerCallback:
    """Writes TensorBoard's files to a directory that stays."""
    from torch.utils.tensorboard import SummaryWriter
    from transformers.integrations import TensorBoardCallback

    return TensorBoardCallback(SummaryWriter(str(folder)))
