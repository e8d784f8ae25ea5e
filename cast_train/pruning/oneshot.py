"""A dense directory (+ calibration text) -> a pruned directory with exact N:M zeros, in one shot.

The methods score the weights (scores.py, sparsegpt.py), and of each group the N highest scores
stay; or the mask is that of another directory. The kept weights stay as they are, or as SparseGPT
moves them, or are solved (solve.py). Each is a baseline for training and a possible start of the
gates.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cast_serve.checkpoint import hub
from cast_serve.checkpoint.declared import Structure
from cast_serve.checkpoint.directory import ModelDirectory
from cast_serve.checkpoint.record import CAST_JSON, check_new, read_record
from cast_serve.errors import UsageError
from cast_serve.sparsity.pattern import Pattern, check_weight, hard_mask
from cast_serve.sparsity.targets import check_expressions, find_targets
from cast_train import attention
from cast_train.checkpoint import channel_order, identity, models
from cast_train.checkpoint.channel_order import ChannelOrder
from cast_train.config import Fixed
from cast_train.pruning.allocate import allocate, kept_of_64
from cast_train.pruning.reorder import reorder
from cast_train.pruning.scores import magnitude_scores, wanda_scores, weight_rows
from cast_train.pruning.solve import solve
from cast_train.pruning.sparsegpt import sparsegpt_scores
from cast_train.tokens import read_tokens, to_blocks

METHODS = ("magnitude", "wanda", "sparsegpt")
MASK_OF_ANOTHER = "mask"


@torch.no_grad()
def prune(targets: Mapping[str, nn.Module], masks: Mapping[str, Tensor]) -> None:
    """Writes zeros into the targets, where masks [out_features, in_features] by name are False."""
    for name, linear in targets.items():
        linear.weight.mul_(masks[name])


def read_masks(
    directory: Path, targets: Mapping[str, nn.Module], patterns: Mapping[str, Pattern]
) -> dict[str, Tensor]:
    """The masks of a gated, pruned or compressed directory, bool [out_features, in_features].

    Args:
        directory: of the same architecture as the targets' model.
        targets: linears by name.
        patterns: N:M by name.

    Raises:
        UsageError: if a target is missing there, has another shape or is not N:M.
    """
    kind = models.kind_of(directory)
    if kind == "gated":
        _, gates, _ = models.load_gated(directory, torch.float32)
        found = {name: gate.mask() for name, gate in gates.items()}
    elif kind == "compressed":  # whose bitmask says more than its values, some of which may be 0
        source = ModelDirectory(directory)
        found = {name: source.target(name).mask for name in source.targets}
    else:
        model = models.load_unmasked(directory, torch.float32)
        known = dict(model.named_modules())
        found = {name: weight_rows(known[name]) != 0 for name in targets if name in known}
    for name, linear in targets.items():
        shape = weight_rows(linear).shape
        if name not in found:
            raise UsageError(
                f"{directory} has no {patterns[name]} weight {name}; give one of the same model"
            )
        if found[name].shape != shape:
            raise UsageError(
                f"{name} of {directory} is {list(found[name].shape)}, not {list(shape)}; "
                "give a directory of the same model"
            )
        check_weight(found[name].float(), patterns[name], f"{name} of {directory}")
        found[name] = hard_mask(found[name].float(), patterns[name])
    return {name: found[name] for name in targets}


def read_calibration(
    text_files: Sequence[Path], tokenizer: Any, num_blocks: int | None = None
) -> Tensor:
    """The first blocks of a text, int64 [num_blocks, block_size].

    Args:
        text_files: UTF-8, read one after another.
        tokenizer: a transformers tokenizer.
        num_blocks: None: `TrainConfig.calibration_blocks`.

    Raises:
        UsageError: if a file cannot be read or the text is too short for one block.
    """
    defaults = Fixed()
    num_tokens = (num_blocks or defaults.calibration_blocks) * defaults.block_size
    return to_blocks(read_tokens(text_files, tokenizer, num_tokens), defaults.block_size)


def write_pruned(
    model_dir: Path,
    text_files: Sequence[Path],
    out: Path,
    method: str,
    sparsity: str = "2:4",
    mask_dir: Path | None = None,
    is_solved: bool = False,
    zeros: float = 1.0,
    exclude: Sequence[str] = (),
) -> dict[str, Any]:
    """Prunes a dense directory into another one.

    Args:
        model_dir: dense HF directory, or its name on a hub.
        text_files: calibration text for wanda, sparsegpt and solving; its first
            `TrainConfig.calibration_blocks` are used.
        out: must not exist.
        method: ``magnitude``, ``wanda``, ``sparsegpt``, or ``mask``: that of mask_dir.
        mask_dir: gated, pruned or compressed directory of the same model; if its channels were
            reordered, so are the model's.
        is_solved: whether the dense model's kept weights are solved under the mask.
        zeros: share of zeros over all weights of the targets, see allocate.py; 1: the pattern's.
        exclude: regular expressions; linears whose names match are not targets.

    Returns:
        cast.json's content.

    Raises:
        UsageError: for every wrong input; nothing is written then.
    """
    known = (*METHODS, MASK_OF_ANOTHER)
    if method not in known:
        raise UsageError(f"method {method!r} does not exist; choose from {', '.join(known)}")
    if (method == MASK_OF_ANOTHER) != (mask_dir is not None):
        raise UsageError(
            "method 'mask' needs a directory to take the mask from (--mask DIR), and no other "
            "method takes one"
        )
    pattern = Pattern.parse(sparsity)
    pattern.check_zeros(zeros)
    pattern = pattern.with_zeros(zeros)
    if mask_dir is not None and zeros != 1:
        raise UsageError(
            f"zeros {zeros} has no effect with method 'mask', whose mask decides them; leave it "
            "at 1"
        )
    check_expressions(exclude)
    check_new(out)
    model_dir = hub.fetch(model_dir)
    mask_dir = hub.fetch(mask_dir) if mask_dir else None
    models.check_dense(model_dir)
    tokenizer = models.load_tokenizer(model_dir)
    blocks = torch.empty(0)
    if is_solved or zeros != 1 or method in ("wanda", "sparsegpt"):
        blocks = read_calibration(text_files, tokenizer)
    model = models.load_dense(model_dir)
    attention.use_blocks(model)
    order = _order_of(model, model_dir, mask_dir)
    targets, _ = find_targets(model, pattern, exclude=exclude)
    if mask_dir is not None:
        patterns = _patterns_of(mask_dir, targets, pattern)
    elif zeros != 1:
        patterns = allocate(model.float(), targets, pattern, blocks, zeros)
    else:
        patterns = dict.fromkeys(targets, pattern)
    kept_dense = [name for name in targets if name not in patterns]
    targets = {name: targets[name] for name in patterns}
    if mask_dir is not None:
        masks = read_masks(mask_dir, targets, patterns)
    else:
        if method == "magnitude":
            scores = magnitude_scores(targets)
        elif method == "wanda":
            scores = wanda_scores(model, targets, blocks)
        else:
            scores = sparsegpt_scores(model.float(), targets, blocks, patterns)
        masks = {name: hard_mask(found, patterns[name]) for name, found in scores.items()}
    if is_solved:
        if method == "sparsegpt":  # which has moved the weights
            model = models.load_dense(model_dir)
            attention.use_blocks(model)
            targets = {name: model.get_submodule(name) for name in targets}
        solve(model.float(), targets, masks, blocks)
    else:
        prune(targets, masks)
    record = {
        "kind": "pruned",
        "method": method,
        "solved": is_solved,
        "n": pattern.n,
        "m": pattern.m,
        "targets": list(targets),
        "kept_dense": kept_dense,
        "kept_of_64": kept_of_64(patterns, pattern),
    }
    if mask_dir is not None:
        record["mask_of"] = identity.of_directory(mask_dir)
    return models.write(
        out, model.to(torch.bfloat16), tokenizer, record, source=model_dir, order=order
    )


def _patterns_of(
    mask_dir: Path, targets: Mapping[str, nn.Module], pattern: Pattern
) -> dict[str, Pattern]:
    """What a directory's record says of the targets, without those that are dense there."""
    record = read_record(mask_dir) if (mask_dir / CAST_JSON).is_file() else {}
    structure = Structure(pattern, record.get("kept_of_64") or {})
    kept_dense = record.get("kept_dense") or ()
    return {name: structure.of(name) for name in targets if name not in kept_dense}


def _order_of(model: Any, model_dir: Path, mask_dir: Path | None) -> ChannelOrder | None:
    """The order of the channels, which is the mask's; the model is reordered if it has none.

    Raises:
        UsageError: if it has another.
    """
    order = channel_order.read(model_dir)
    mask_order = channel_order.read(mask_dir) if mask_dir else order
    if mask_order == order:
        return order
    if order is not None or mask_order is None:
        raise UsageError(
            f"the channel order of {model_dir} differs from that of {mask_dir}; give the dense "
            "model that both were made from"
        )
    reorder(model, mask_order)
    return mask_order
