"""A sparse or dense directory + calibration text -> a compressed one, its integers chosen together.

Rounded to the nearest, each kept weight w has an error of its own, and those of a row add up in its
output. Here the integers z of a row are chosen together, under its mask and with fixed scales, so
that on the calibration text the output changes least:

    E(z) = (w - s z) H (w - s z)^T,   H = X^T X of the linear's inputs, damped

The scales s are those of least squared error where each weight counts as much as its input,
H's diagonal. Then, from the nearest integers on, column after column each integer becomes the one
of least E with all others as they are, SWEEPS times over. E falls or stays at every step, so the
result is never worse than rounding, on that text. All rows go at once: a step is one column of the
weight. Later linears see the outputs of quantised ones. Source of the descent: Behdin et al.,
"QuantEase: optimization-based quantization for language models", 2023.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cast_serve.checkpoint import hub
from cast_serve.checkpoint.convert import check_outputs, check_source, convert
from cast_serve.checkpoint.directory import ModelDirectory
from cast_serve.checkpoint.linear import CompressedLinear
from cast_serve.checkpoint.quantization import Quantization
from cast_serve.checkpoint.scheme import resolved
from cast_serve.checkpoint.target import Calibrated
from cast_serve.sparsity.pattern import Pattern
from cast_serve.sparsity.quantize import MAX_INT4, MAX_INTEGER, one_thread
from cast_train.checkpoint import identity, models
from cast_train.pruning.oneshot import read_calibration
from cast_train.pruning.sparsegpt import damped, replace_weights

SWEEPS = 4
DAMPING = 0.05  # of H's mean diagonal: on other text better than SparseGPT's 0.01
COLUMNS = 64  # of a block: what changes in it reaches the columns after it once the block is done


def write_quantized(
    source: Path,
    text_files: Sequence[Path],
    out: Path,
    quantization: Quantization,
    num_blocks: int | None = None,
    pattern: Pattern | None = None,
) -> dict[str, Any]:
    """Quantises and compresses a sparse directory, or as 64:64 a dense one.

    Args:
        source: gated, pruned, compressed or dense, not quantised; or its name on a hub.
        text_files: calibration text, of which the beginning is used.
        out: must not exist.
        quantization: of the targets' values, and of the output layer, rounded to the nearest.
        num_blocks: calibration sequences; None: `TrainConfig.calibration_blocks`.
        pattern: of a source whose files do not say it; None: 2:4.

    Returns:
        `inspect` of the output.

    Raises:
        UsageError: for every wrong input; nothing is written then.
    """
    check_outputs([out])
    folder = hub.fetch(source)
    directory = ModelDirectory(folder, pattern)
    asked = resolved(quantization, folder)
    check_source(directory, asked)
    blocks = read_calibration(text_files, models.load_tokenizer(folder), num_blocks)
    model = models.load_any(folder, torch.float32)
    linears = {name: model.get_submodule(name) for name in directory.targets}
    found: dict[str, CompressedLinear] = {}
    for name, linear in linears.items():
        linear.weight.data.copy_(directory.target(name).dense(torch.float32))

    def quantized(name: str, _: Tensor, hessian: Tensor) -> Tensor:
        target = directory.target(name)
        found[name] = quantize_linear(target, hessian, quantization)
        return found[name].dense(torch.float32)

    replace_weights(model, linears, blocks, quantized)
    record = {
        "text": identity.of_texts(text_files),
        "num_tokens": blocks.numel(),
        "sweeps": SWEEPS,
    }
    calibrated = Calibrated(found, record)
    return convert(folder, out, quantization=asked, calibrated=calibrated, pattern=pattern)


@torch.no_grad()
def quantize_linear(
    linear: CompressedLinear, hessian: Tensor, quantization: Quantization
) -> CompressedLinear:
    """One linear with its integers and scales.

    Args:
        linear: not quantised.
        hessian: X^T X of its inputs, fp32 [in_features, in_features].
        quantization: to 8 or to 4 bits.
    """
    mask = linear.mask
    hessian = damped(hessian, DAMPING)
    importance = hessian.diagonal().expand(mask.shape)[mask].view(linear.values.shape)
    nearest = linear.quantize(quantization, importance)
    assert nearest.scale is not None
    found = descend(
        linear.dense().float(),
        nearest.dense(torch.float32),
        mask,
        nearest.scale.float(),
        quantization.group or linear.in_features,
        MAX_INT4 if quantization.group else MAX_INTEGER,
        hessian,
    )
    return replace(nearest, values=found.to(torch.int8)[mask].view(linear.values.shape))


def descend(
    weight: Tensor,
    start: Tensor,
    mask: Tensor,
    scale: Tensor,
    scale_group: int,
    largest: int,
    hessian: Tensor,
) -> Tensor:
    """The integers of a weight, by coordinate descent: fp32 [out_features, in_features].

    Args:
        weight: fp32 [out_features, in_features].
        start: the quantised weight to start from, integers times scales, the same shape.
        mask: bool, the same shape; the integers are 0 where it is False.
        scale: fp32 [out_features, number of scale groups].
        scale_group: columns that share a scale.
        largest: integer.
        hessian: fp32 [in_features, in_features], its diagonal above 0.
    """
    # A column of the weight is a row here.
    found, kept, scales = start.t().contiguous(), mask.t().contiguous(), scale.t().contiguous()
    wanted = weight.t().contiguous()
    changed = found - wanted
    num_columns = len(found)
    for _ in range(SWEEPS):
        for begin in range(0, num_columns, COLUMNS):
            end = min(begin + COLUMNS, num_columns)
            # Half of E's gradient, with the changes of this block as they come.
            gradient = hessian[begin:end] @ changed
            with one_thread():
                for i in range(begin, end):
                    step = scales[i // scale_group]
                    best = found[i] - gradient[i - begin] / hessian[i, i]
                    best = (best / step).round_().clamp_(-largest, largest).mul_(step).mul_(kept[i])
                    gradient[i - begin + 1 :].addr_(hessian[i, i + 1 : end], best - found[i])
                    found[i] = best
            changed[begin:end] = found[begin:end] - wanted[begin:end]
    steps = scales.repeat_interleave(scale_group, dim=0)[:num_columns]
    return (found / steps).round().t().contiguous()
