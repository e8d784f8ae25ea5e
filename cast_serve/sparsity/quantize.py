"""Weights and activations <-> integers of 8 or 4 bits and their scales: symmetric.

    weight row r, int8  W[r, k] ~ values[r, k] * scale[r]       scale in the weight's dtype, on disk
    weight row r, int4  W[r, k] ~ values[r, k] * scale[r, h]    the same
    activation token t  X[t, k] ~ values[t, k] * scale[t, g]    scale fp32, anew for every product

with g the scale group of 128 columns that k is in, and h that of 128, 64 or 32 columns, so that a
product is a sum over scale groups of scales * (an exact sum of integers). int8 is within +-127: it
leaves out -128, of which a codec that takes absolute values in 8 bits makes a wrong mask. int4 is
within +-7.

A scale of a weight is the one of least squared error among fractions of max|w| / 127 (int4: / 7),
taken over the row or scale group that it belongs to. A smaller scale cuts the largest weights off
and rounds all others more finely; 4 bits gain from cutting off much more. Each candidate is first
rounded to the weight's dtype (int4: to bf16, which its kernel holds), then the integers are chosen
for it: in bf16 neighbouring scales differ by 0.4 to 0.8 %, so a much finer grid would try the same
scales twice. Values that are 0 add no error whatever the scale is, so a row's kept weights get the
scale of the whole row, and weights with their zeros the scales of the kept ones. An *importance* of
each weight, such as the mean square of what it multiplies, makes the error a weighted sum.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

MAX_INTEGER = 127
MAX_INT4 = 7
SCALE_GROUP = 128  # columns of the activations that share a scale
INT4_SCALE_GROUPS = (128, 64, 32)  # columns of a 4-bit weight's row that share a scale
FRACTIONS = [1 - step / 200 for step in range(21)]  # 1.00, 0.995, ... 0.90 of max|w| / 127
INT4_FRACTIONS = [1 - step / 40 for step in range(21)]  # 1.00, 0.975, ... 0.50 of max|w| / 7
SCALES_CHOSEN = (
    "per row, the least squared error among 1.00, 0.995, ... 0.90 of max|w| / 127, "
    "rounded to the weight's dtype"
)
INT4_SCALES_CHOSEN = (
    "per scale group, the least squared error among 1.00, 0.975, ... 0.50 of max|w| / 7, "
    "rounded to bf16"
)
SCALES_TAKEN_OVER = "as in the source"  # quantised by another program
SLAB_ELEMENTS = 1 << 20  # weights worked on at a time: some fp32 copies of 4 MB each


class Grid(NamedTuple):
    """What integers there are, and which scales are tried.

    Attributes:
        largest: integer; the least is its negative.
        fractions: of max|w| / largest.
        is_bf16: whether scales are rounded to bf16 whatever the weight's dtype is.
    """

    largest: int
    fractions: list[float]
    is_bf16: bool


INT8 = Grid(MAX_INTEGER, FRACTIONS, is_bf16=False)
INT4 = Grid(MAX_INT4, INT4_FRACTIONS, is_bf16=True)


def quantize_rows(
    weight: Tensor, name: str = "weight", importance: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Quantises each row of a weight with the scale of least squared error among FRACTIONS.

    Args:
        weight: [N, K], bf16, fp16 or fp32.
        name: for error messages.
        importance: of each weight, fp32 [N, K]; None: equal.

    Returns:
        values int8 [N, K] within +-127 and scale [N, 1] in the weight's dtype, finite and positive.
        A row of zeros gets scale 1.

    Raises:
        ValueError: if a weight is Inf or NaN.
    """
    return _quantize(weight, importance, INT8, name)


def quantize_values_int4(
    values: Tensor,
    scale_group: int = SCALE_GROUP,
    name: str = "weight",
    importance: Tensor | None = None,
    *,
    has_zeros: bool = False,
) -> tuple[Tensor, Tensor]:
    """Quantises a weight to 4 bits, each scale group of a row by itself.

    Of 2:4 it takes the kept weights: every four dense columns keep two, so the scale group of a
    kept value is its own column in `values` divided by scale_group / 2, whatever the mask is. Of N
    of 64 it takes the weight with its zeros, since half a word keeps any number.

    Args:
        values: kept weights [out_features, in_features / 2], bf16, fp16 or fp32, or with has_zeros
            the weight [out_features, in_features].
        scale_group: dense columns that share a scale, one of INT4_SCALE_GROUPS; the last group of
            a row may have fewer.
        name: for error messages.
        importance: of each weight, fp32, as `values`; None: equal.

    Returns:
        values int8 within +-7, of the same shape, and scale [out_features, ceil(in_features /
        scale_group)] in the weight's dtype, finite and positive; 1 where a group is all zeros.

    Raises:
        ValueError: if a weight is Inf or NaN, or for another scale_group.
    """
    groups = _scale_groups(values, scale_group, has_zeros)
    num_rows, num_groups, kept = groups.shape
    if importance is not None:
        importance = _scale_groups(importance, scale_group, has_zeros).flatten(0, 1)
    integers, scale = _quantize(groups.flatten(0, 1), importance, INT4, name, num_groups)
    integers = integers.view(num_rows, num_groups * kept)[:, : values.shape[1]]
    return integers.contiguous(), scale.view(num_rows, num_groups)


def nearest_integers(
    values: Tensor, scale: Tensor, scale_group: int | None, *, has_zeros: bool = False
) -> Tensor:
    """The integers of weights whose scales are given, int8 of the same shape.

    Args:
        values: of int4 as `quantize_values_int4` takes them, of int8 any weights of each row.
        scale: as `quantize_values_int4` gives it, or with scale_group None `quantize_rows`.
        scale_group: of int4, the dense columns that share a scale; None: int8.
        has_zeros: as `quantize_values_int4` takes it.
    """
    if scale_group is None:
        return _integers(values.float(), scale.float(), INT8).to(torch.int8)
    groups = _scale_groups(values, scale_group, has_zeros).float()
    integers = _integers(groups, scale.float().unsqueeze(-1), INT4).to(torch.int8).flatten(1)
    return integers[:, : values.shape[1]].contiguous()


def dequantize_int4(
    values: Tensor,
    scale: Tensor,
    scale_group: int,
    dtype: torch.dtype | None = None,
    *,
    has_zeros: bool = False,
) -> Tensor:
    """The inverse of `quantize_values_int4`: multiplied in fp32, rounded to `dtype` (None: the
    scale's); of the values' shape."""
    groups = _scale_groups(values, scale_group, has_zeros)
    kept = dequantize(groups, scale.unsqueeze(-1), dtype).flatten(1)
    return kept[:, : values.shape[1]].contiguous()


def quantize_groups(x: Tensor) -> tuple[Tensor, Tensor]:
    """Quantises each token's scale groups of 128 columns by their largest absolute value.

    All in fp32, and bit for bit the same in every kernel: scale = max|x| / 127; values = x / scale
    (a division, not a product with the reciprocal), clamped to +-127 and rounded half to even.
    Where the scale is 0 the values are 0. A group that holds Inf or NaN gets scale NaN, values 0.

    Args:
        x: [..., in_features], bf16, fp16 or fp32.

    Returns:
        values int8 [..., num_groups, 128], padded with 0, and scale fp32 [..., num_groups].
    """
    padding = -x.shape[-1] % SCALE_GROUP
    groups = torch.nn.functional.pad(x.float(), (0, padding)).unflatten(-1, (-1, SCALE_GROUP))
    scale = groups.abs().amax(-1) / MAX_INTEGER
    scale = torch.where(torch.isfinite(scale), scale, torch.nan)
    is_usable = (scale > 0).unsqueeze(-1)
    values = (groups / scale.unsqueeze(-1)).clamp(-MAX_INTEGER, MAX_INTEGER).round()
    return torch.where(is_usable, values, 0.0).to(torch.int8), scale


def rounded(x: Tensor) -> Tensor:
    """Activations [..., in_features] as a quantised linear sees them, in their own dtype.

    The products values * scale of `quantize_groups`, made in place, as training makes them for
    every linear of every step.
    """
    padding = -x.shape[-1] % SCALE_GROUP
    wide = torch.nn.functional.pad(x.float(), (0, padding)) if padding else x.float()
    groups = wide.unflatten(-1, (-1, SCALE_GROUP))
    scale = groups.abs().amax(-1, keepdim=True) / MAX_INTEGER
    scale = torch.where(torch.isfinite(scale), scale, torch.nan)
    scale = torch.where(scale == 0, 1.0, scale)  # all its values are 0, whatever divides them
    values = (groups / scale).clamp_(-MAX_INTEGER, MAX_INTEGER).round_()
    products = values.mul_(scale).flatten(-2)
    return (products[..., : x.shape[-1]] if padding else products).to(x.dtype)


def dequantize(values: Tensor, scale: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """values * scale: multiplied in fp32, then rounded to `dtype` (default: the scale's).

    Args:
        values: int8 or float8 [..., K].
        scale: [..., 1].
    """
    return (values.float() * scale.float()).to(dtype or scale.dtype)


def _scale_groups(values: Tensor, scale_group: int, has_zeros: bool) -> Tensor:
    """Kept values [N, K / 2] of 2:4 -> [N, num_groups, scale_group / 2], padded with 0; weights
    with their zeros [N, K] -> [N, num_groups, scale_group].

    Raises:
        ValueError: for a scale_group that is not one of INT4_SCALE_GROUPS.
    """
    if scale_group not in INT4_SCALE_GROUPS:
        known = ", ".join(map(str, INT4_SCALE_GROUPS))
        raise ValueError(f"a scale group of {scale_group} columns does not exist; use {known}")
    kept = scale_group if has_zeros else scale_group // 2
    return torch.nn.functional.pad(values, (0, -values.shape[1] % kept)).unflatten(1, (-1, kept))


def _quantize(
    weight: Tensor, importance: Tensor | None, grid: Grid, name: str, groups_a_row: int = 1
) -> tuple[Tensor, Tensor]:
    """A scale for each row of `weight` [N, K]; see `quantize_rows`.

    Args:
        groups_a_row: rows of `weight` that are one row of the linear, for error messages.
    """
    num_rows, num_columns = weight.shape
    values = torch.empty_like(weight, dtype=torch.int8)
    scale = weight.new_empty(num_rows, 1)
    if weight.is_meta:
        return values, scale
    rows_in_slab = max(1, SLAB_ELEMENTS // max(1, num_columns))
    with one_thread():
        for start in range(0, num_rows, rows_in_slab):
            rows = slice(start, start + rows_in_slab)
            slab = weight[rows].float()
            is_bad = ~torch.isfinite(slab).all(1)
            if is_bad.any():
                row = (start + int(is_bad.nonzero()[0])) // groups_a_row
                raise ValueError(
                    f"{name}: row {row} holds Inf or NaN, which has no scale; "
                    "check the training for divergence"
                )
            important = None if importance is None else importance[rows]
            scale[rows] = _best_scale(slab, important, weight.dtype, grid)
            values[rows] = _integers(slab, scale[rows].float(), grid).to(torch.int8)
    return values, scale


def _best_scale(
    weight: Tensor, importance: Tensor | None, dtype: torch.dtype, grid: Grid
) -> Tensor:
    """The scale [N, 1], already rounded to `dtype`, of fp32 weights [N, K]."""
    most = weight.abs().amax(1, keepdim=True)
    # The smallest positive scale: fp16's subnormals are exact, and weights of that size common.
    smallest = 2.0**-24 if dtype == torch.float16 else torch.finfo(dtype).tiny
    best = torch.ones_like(most)
    least = torch.full_like(most, torch.inf)
    for fraction in grid.fractions:
        scale = (most / grid.largest * fraction).clamp(min=smallest)
        scale = (scale.bfloat16() if grid.is_bf16 else scale).to(dtype).float()
        error = _integers(weight, scale, grid).mul_(scale).sub_(weight).square_()
        if importance is not None:
            error.mul_(importance)
        error = error.sum(1, keepdim=True)
        is_better = (error < least) & (most > 0)
        best = torch.where(is_better, scale, best)
        least = torch.where(is_better, error, least)
    return best


def _integers(x: Tensor, scale: Tensor, grid: Grid) -> Tensor:
    """The nearest integers of x / scale that the grid has, as fp32."""
    return (x / scale).round_().clamp_(-grid.largest, grid.largest)


@contextmanager
def one_thread() -> Iterator[None]:
    """Some 100 short operations a slab: where other programs use the cores, threads that wait for
    each other after every one of them take many times as long as one thread."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)
