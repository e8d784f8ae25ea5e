"""Text files + TrainConfig -> token blocks to train on, calibrate, choose and measure with."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from cast_train import sharding
from cast_train.config import Pruned, TrainConfig
from cast_train.text import read_texts, split_held_out, to_blocks, tokenize


@dataclass(frozen=True)
class Blocks:
    """A run's text, int64 [num_blocks, block_size] each.

    Attributes:
        train: trained on.
        calibration: its beginning, which activations are measured on.
        validation: kept out of the training text; `keep_best` chooses by it.
        heldout: what quality is measured on: validation, or a text of its own.
        heldout_name: its description.
    """

    train: Tensor
    calibration: Tensor
    validation: Tensor
    heldout: Tensor
    heldout_name: str


def read_blocks(
    text_files: Sequence[Path], heldout_file: Path | None, tokenizer: Any, config: TrainConfig
) -> Blocks:
    """Reads and cuts the texts.

    Raises:
        UsageError: if a file cannot be read or a text is too short.
    """
    heldout_text = read_texts([heldout_file]) if heldout_file else ""
    blocks = to_blocks(tokenize(read_texts(text_files), tokenizer), config.block_size)
    step = config.batch_blocks * config.accumulation * sharding.num_processes()
    train, validation = split_held_out(blocks, config.heldout_blocks, step)
    if config.accumulation > 1:  # else the last step of an epoch would be one of fewer batches
        train = train[: len(train) // step * step]
    calibration = train[: config.calibration_blocks] if isinstance(config, Pruned) else train[:0]
    heldout, name = validation, "held-out split of the training text"
    if heldout_file is not None:
        tokens = tokenize(heldout_text, tokenizer, config.heldout_blocks * config.block_size)
        heldout, name = to_blocks(tokens, config.block_size), heldout_file.name
    return Blocks(train, calibration, validation, heldout, name)
