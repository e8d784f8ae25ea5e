"""A dense model (+ calibration blocks) -> importance scores and one-shot N:M masks.

Magnitude scores a weight by |W|; Wanda by |W_ij| * ||x_j||_2, x_j the linear's j-th input over all
calibration tokens; SparseGPT by |W_ij| / U_jj, U the upper Cholesky factor of the inverse of
H = X^T X, and it moves the weights that stay so that they make up for those that go. All are
baselines that training must beat, and the gates' possible starts. Sources: Sun et al., "A simple
and effective pruning approach for large language models", 2023 (all activations come from one pass
of the dense model here; the authors prune layer after layer); Frantar and Alistarh, "SparseGPT:
massive language models can be accurately pruned in one-shot", 2023.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from cast_serve.checkpoint.record import check_new
from cast_serve.sparsity.pattern import Pattern, hard_mask
from cast_serve.sparsity.targets import find_targets
from cast_train.checkpoint import models
from cast_train.config import TrainConfig
from cast_train.gates.gating import is_transposed
from cast_train.text import read_texts, to_blocks, tokenize

METHODS = ("magnitude", "wanda", "sparsegpt")
DAMPING = 0.01  # of H's mean diagonal, added to its diagonal: SparseGPT's own default
COLUMNS = 128  # at most, that SparseGPT works on before it carries their errors to the rest


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
    _check_reached(targets, squares)
    return {name: _rows(linear).abs() * squares[name].sqrt() for name, linear in targets.items()}


@torch.no_grad()
def sparsegpt_scores(
    model: nn.Module, targets: Mapping[str, nn.Module], blocks: Tensor, pattern: Pattern
) -> dict[str, Tensor]:
    """SparseGPT's scores by name, fp32 [out_features, in_features]; the weights are moved.

    One pass over all blocks at once: each target is pruned as its inputs arrive, and its outputs
    are already those of the pruned one, so later layers make up for earlier ones. In the end the
    weights that the N highest scores keep are those that make up for the others; the others have
    the value that they were dropped with.

    Args:
        model: a transformers model that the targets belong to, fp32: they move by less than bf16
            can hold.
        targets: linears by name; their weights are overwritten.
        blocks: calibration tokens, int64 [num_blocks, block_size].
        pattern: N:M.

    Raises:
        ValueError: if the calibration tokens never reach a target.
    """
    moved: dict[str, Tensor] = {}
    scores: dict[str, Tensor] = {}
    seen: list[Tensor] = [torch.empty(0)] * 2  # the last inputs and their H: q, k and v share it
    progress = tqdm(total=len(targets), desc="calibration", unit="linear")

    def watch(name: str) -> Callable[[nn.Module, Any], None]:
        def hook(linear: Any, inputs: Any) -> None:
            if inputs[0] is not seen[0]:
                tokens = inputs[0].flatten(0, -2).float()
                seen[:] = inputs[0], tokens.t() @ tokens
            moved[name], scores[name] = _sparsegpt(_rows(linear), seen[1], pattern)
            kept = moved[name] * hard_mask(scores[name], pattern)
            linear.weight.copy_(kept.t() if is_transposed(linear) else kept)
            progress.update()

        return hook

    hooks = [linear.register_forward_pre_hook(watch(name)) for name, linear in targets.items()]
    was_training = model.training
    model.eval()
    try:
        device = next(model.parameters()).device
        model.base_model(input_ids=blocks.to(device), use_cache=False)  # no logits
    finally:
        model.train(was_training)
        progress.close()
        for hook in hooks:
            hook.remove()
    _check_reached(targets, scores)
    for name, linear in targets.items():
        linear.weight.copy_(moved[name].t() if is_transposed(linear) else moved[name])
    return scores


def _sparsegpt(weight: Tensor, hessian: Tensor, pattern: Pattern) -> tuple[Tensor, Tensor]:
    """One linear's moved weights and scores, [out_features, in_features].

    Args:
        weight: fp32 [out_features, in_features].
        hessian: X^T X, fp32 [in_features, in_features].
    """
    hessian = hessian.clone()
    diagonal = hessian.diagonal()
    diagonal[diagonal == 0] = 1  # an input that is always 0
    diagonal += DAMPING * diagonal.mean()
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    upper = torch.linalg.cholesky(inverse, upper=True)
    columns = weight.t().contiguous()  # a column of the weight is a row here
    scores = torch.empty_like(columns)
    kept = torch.empty_like(columns, dtype=torch.bool)
    m, num_columns = pattern.m, len(columns)
    # Whole groups: a group's columns are ranked together, so all must have the errors before them.
    block = max(COLUMNS // m * m, m)
    for begin in range(0, num_columns, block):
        end = min(begin + block, num_columns)
        errors = torch.empty_like(columns[begin:end])
        for i in range(begin, end):
            if i % m == 0:
                group = slice(i, i + m)
                scores[group] = columns[group].abs() / upper.diagonal()[group, None]
                kept[group] = hard_mask(scores[group].t(), pattern).t()
            errors[i - begin] = columns[i].masked_fill(kept[i], 0) / upper[i, i]
            columns[i + 1 : end] -= upper[i, i + 1 : end, None] * errors[i - begin]
        columns[end:] -= upper[begin:end, end:].t() @ errors
    return columns.t().contiguous(), scores.t().contiguous()


def _check_reached(targets: Mapping[str, nn.Module], reached: Mapping[str, Any]) -> None:
    missed = sorted(set(targets) - set(reached))
    if missed:
        raise ValueError(f"the calibration text never reached {', '.join(missed)}; exclude them")


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


def _rows(linear: nn.Module) -> Tensor:
    weight = linear.weight.detach().float()
    return weight.t() if is_transposed(linear) else weight
