"""A dense model (+ calibration blocks) -> importance scores and one-shot N:M masks.

Magnitude scores a weight by |W|; Wanda by |W_ij| * ||x_j||_2, x_j the linear's j-th input over all
calibration tokens. Both are the baselines that training must beat, and the gates' possible starts.
Source: Sun et al., "A simple and effective pruning approach for large language models", 2023. All
activations come from one pass of the dense model; Wanda's authors prune layer after layer instead.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from cast_serve.nm import Pattern, find_targets, hard_mask
from cast_train import checkpoint
from cast_train.config import TrainConfig
from cast_train.gates import is_transposed
from cast_train.text import read_texts, to_blocks, tokenize

METHODS = ("magnitude", "wanda")


def magnitude_scores(targets: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """|W| by name, fp32 [out_features, in_features]."""
    return {name: _rows(linear).abs() for name, linear in targets.items()}


def wanda_scores(
    model: nn.Module, targets: Mapping[str, nn.Module], blocks: Tensor, batch_blocks: int = 4
) -> dict[str, Tensor]:
    """|W| * ||x||_2 by name, fp32 [out_features, in_features].

    Args:
        model: the model that the targets belong to; it is left as it was.
        blocks: calibration tokens, int64 [num_blocks, block_size].
        batch_blocks: sequences per pass.

    Raises:
        ValueError: if the calibration tokens never reach a target.
    """
    squares: dict[str, Tensor] = {}

    def watch(name: str) -> Callable[[nn.Module, Any], None]:
        def hook(_: nn.Module, inputs: Any) -> None:
            found = inputs[0].detach().flatten(0, -2).float().square().sum(0)
            squares[name] = squares[name] + found if name in squares else found

        return hook

    hooks = [linear.register_forward_pre_hook(watch(name)) for name, linear in targets.items()]
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            device = next(model.parameters()).device
            for batch in tqdm(blocks.split(batch_blocks), desc="calibration", unit="batch"):
                model(input_ids=batch.to(device), use_cache=False)
    finally:
        model.train(was_training)
        for hook in hooks:
            hook.remove()
    missed = sorted(set(targets) - set(squares))
    if missed:
        raise ValueError(f"the calibration text never reached {', '.join(missed)}; exclude them")
    return {name: _rows(linear).abs() * squares[name].sqrt() for name, linear in targets.items()}


@torch.no_grad()
def prune(targets: Mapping[str, nn.Module], scores: Mapping[str, Tensor], pattern: Pattern) -> None:
    """Writes zeros into the targets: in each group the N highest scores keep their weight.

    Raises:
        PatternError: if a score is NaN.
    """
    for name, linear in targets.items():
        mask = hard_mask(scores[name], pattern)
        linear.weight.mul_(mask.t() if is_transposed(linear) else mask)


def write_pruned(
    model_dir: Path, text_files: Sequence[Path], out: Path, method: str, sparsity: str = "2:4"
) -> dict[str, Any]:
    """Prunes a dense directory into another one.

    Args:
        model_dir: dense HF directory.
        text_files: calibration text for wanda; its first `TrainConfig.calibration_blocks` are used.
        out: must not exist.
        method: ``magnitude`` or ``wanda``.

    Returns:
        cast.json's content.

    Raises:
        ValueError: for every wrong input; nothing is written then.
    """
    if method not in METHODS:
        raise ValueError(f"method {method!r} does not exist; choose from {', '.join(METHODS)}")
    pattern, defaults = Pattern.parse(sparsity), TrainConfig()
    checkpoint.check_new(out)
    tokenizer = checkpoint.load_tokenizer(model_dir)
    model = checkpoint.load_dense(model_dir)
    targets, _ = find_targets(model, pattern)
    if method == "magnitude":
        scores = magnitude_scores(targets)
    else:
        num_tokens = defaults.calibration_blocks * defaults.block_size
        tokens = tokenize(read_texts(text_files), tokenizer, num_tokens)
        scores = wanda_scores(model, targets, to_blocks(tokens, defaults.block_size))
    prune(targets, scores, pattern)
    record = {
        "kind": "pruned",
        "method": method,
        "n": pattern.n,
        "m": pattern.m,
        "targets": list(targets),
    }
    return checkpoint.write(out, model, tokenizer, record)


def _rows(linear: nn.Module) -> Tensor:
    weight = linear.weight.detach().float()
    return weight.t() if is_transposed(linear) else weight
