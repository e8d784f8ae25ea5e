"""A dense directory (+ calibration text) -> a pruned directory with exact N:M zeros, in one shot.

The methods score the weights (scores.py, sparsegpt.py); of each group the N highest scores stay.
Each is a baseline for training and a possible start of the gates.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cast_serve.checkpoint.record import check_new
from cast_serve.sparsity.pattern import Pattern, hard_mask
from cast_serve.sparsity.targets import find_targets
from cast_train.checkpoint import models
from cast_train.config import TrainConfig
from cast_train.gates.gating import is_transposed
from cast_train.pruning.scores import magnitude_scores, wanda_scores
from cast_train.pruning.sparsegpt import sparsegpt_scores
from cast_train.text import read_texts, to_blocks, tokenize

METHODS = ("magnitude", "wanda", "sparsegpt")


@torch.no_grad()
def prune(targets: Mapping[str, nn.Module], scores: Mapping[str, Tensor], pattern: Pattern) -> None:
    """Writes zeros into the targets: in each group the N highest scores keep their weight.

    Raises:
        PatternError: if a score is NaN.
    """
    for name, linear in targets.items():
        mask = hard_mask(scores[name], pattern)
        linear.weight.mul_(mask.t() if is_transposed(linear) else mask)


def read_calibration(text_files: Sequence[Path], tokenizer: Any) -> Tensor:
    """The first `TrainConfig.calibration_blocks` of a text, int64 [num_blocks, block_size].

    Args:
        text_files: UTF-8, read one after another.
        tokenizer: a transformers tokenizer.

    Raises:
        ValueError: if a file cannot be read or the text is too short for one block.
    """
    defaults = TrainConfig()
    num_tokens = defaults.calibration_blocks * defaults.block_size
    tokens = tokenize(read_texts(text_files), tokenizer, num_tokens)
    return to_blocks(tokens, defaults.block_size)


def write_pruned(
    model_dir: Path, text_files: Sequence[Path], out: Path, method: str, sparsity: str = "2:4"
) -> dict[str, Any]:
    """Prunes a dense directory into another one.

    Args:
        model_dir: dense HF directory.
        text_files: calibration text for wanda and sparsegpt; its first
            `TrainConfig.calibration_blocks` are used.
        out: must not exist.
        method: ``magnitude``, ``wanda`` or ``sparsegpt``.

    Returns:
        cast.json's content.

    Raises:
        ValueError: for every wrong input; nothing is written then.
    """
    if method not in METHODS:
        raise ValueError(f"method {method!r} does not exist; choose from {', '.join(METHODS)}")
    pattern = Pattern.parse(sparsity)
    check_new(out)
    tokenizer = models.load_tokenizer(model_dir)
    model = models.load_dense(model_dir)
    targets, _ = find_targets(model, pattern)
    if method == "magnitude":
        scores = magnitude_scores(targets)
    else:
        blocks = read_calibration(text_files, tokenizer)
        if method == "wanda":
            scores = wanda_scores(model, targets, blocks)
        else:
            model.float()
            scores = sparsegpt_scores(model, targets, blocks, pattern)
    prune(targets, scores, pattern)
    record = {
        "kind": "pruned",
        "method": method,
        "n": pattern.n,
        "m": pattern.m,
        "targets": list(targets),
    }
    return models.write(out, model.to(torch.bfloat16), tokenizer, record)
