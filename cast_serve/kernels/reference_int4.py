"""The specification of the 4-bit kernels in plain torch: packed layout, pack, unpack, the linear.

A packed weight is uint8 [tile_rows, tile_columns, tile_bytes] as in reference.py, a tile being 8
out_features by 128 in_features, with a scale for every *scale group* of 128, 64 or 32 columns:

    first    values: 8 rows of 32 bytes, of two kept weights each, row after row
    then     positions: 8 rows of 128 bits, 4 bits a group of four columns, row after row
    then     scales: 8 rows of 128 / group bf16 numbers, row after row

which is 400, 416 or 448 bytes for 1024 weights: 3.125, 3.25 or 3.5 bits each.

A row's 64 kept weights k = 16 a + 8 b + 4 c + d lie in byte 16 c + 4 a + d, in the lower four bits
if b is 0, as two's complement. Read as 32 bytes and shifted, they are 64 bytes: four times 4 bytes
of each of the scale groups of 32, in order (csrc/avx512vnni_few.h).
"""

import torch
from torch import Tensor

from cast_serve.kernels.reference import (
    INT8_TILE_COLUMNS,
    TILE_ROWS,
    bitmask_of,
    positions_of,
    rows_of,
    tiles_of,
)
from cast_serve.sparsity.bitmask import decompress
from cast_serve.sparsity.pattern import PatternError
from cast_serve.sparsity.quantize import INT4_SCALE_GROUPS, quantize_groups

LEAST_INT4, MOST_INT4 = -8, 7
VALUES_BYTES = TILE_ROWS * INT8_TILE_COLUMNS // 4
POSITIONS_BYTES = TILE_ROWS * INT8_TILE_COLUMNS // 8


def int4_packed_shape(out_features: int, in_features: int, group: int) -> tuple[int, int, int]:
    """The shape of a packed 4-bit weight in bytes.

    Raises:
        ValueError: if `group` is not 128, 64 or 32.
    """
    if group not in INT4_SCALE_GROUPS:
        raise ValueError(f"a scale group of {group} columns is none of 128, 64 and 32")
    scales_bytes = TILE_ROWS * (INT8_TILE_COLUMNS // group) * torch.bfloat16.itemsize
    tile_bytes = VALUES_BYTES + POSITIONS_BYTES + scales_bytes
    return -(-out_features // TILE_ROWS), -(-in_features // INT8_TILE_COLUMNS), tile_bytes


def pack_int4(values: Tensor, bitmask: Tensor, scale: Tensor, group: int = 128) -> Tensor:
    """Compressed 4-bit weight -> packed weight.

    Args:
        values: int8 [out_features, in_features / 2], -8 to 7; we write -7 to 7, others write -8.
        bitmask: uint8 [out_features, ceil(in_features / 8)]; bits past in_features may be set.
        scale: bf16, fp16 or fp32 [out_features, ceil(in_features / group)], finite. It is kept in
            bf16: one of fp16 or fp32 is rounded, by at most 0.2 %.
        group: columns that share a scale; the last ones may be fewer.

    Returns:
        uint8 [tile_rows, tile_columns, tile_bytes], contiguous, as `int4_packed_shape`.

    Raises:
        PatternError: if a group of four columns has not exactly two bits.
        ValueError: if a value does not fit in 4 bits, a scale is not finite or above the largest of
            bf16, or their number is another one.
    """
    out_features, in_features = values.shape[0], values.shape[1] * 2
    shape = int4_packed_shape(out_features, in_features, group)
    if tuple(scale.shape) != (out_features, -(-in_features // group)):
        raise ValueError(
            f"scale is {list(scale.shape)}; [{out_features}, {-(-in_features // group)}] is needed "
            f"for a weight [{out_features}, {in_features}] in scale groups of {group} columns"
        )
    if values.is_meta:
        return torch.empty(shape, dtype=torch.uint8, device="meta")
    if values.numel() and not LEAST_INT4 <= int(values.min()) <= int(values.max()) <= MOST_INT4:
        raise ValueError(
            f"values are {int(values.min())} to {int(values.max())}; 4 bits hold {LEAST_INT4} to "
            f"{MOST_INT4}: pack 8-bit values by `pack`"
        )
    bf16_scale = scale.bfloat16()
    if not bf16_scale.isfinite().all():
        row = int((~bf16_scale.isfinite()).any(1).nonzero()[0])
        raise ValueError(
            f"row {row} has a scale of {float(scale[row].float().abs().max())}; finite ones of at "
            f"most {torch.finfo(torch.bfloat16).max:.4g} are needed: convert the model again"
        )
    tile_rows, tile_columns, _ = shape
    rows, columns = tile_rows * TILE_ROWS, tile_columns * INT8_TILE_COLUMNS
    padded_values = values.new_zeros(rows, columns // 2)
    padded_values[:out_features, : values.shape[1]] = values
    padded_scale = bf16_scale.new_zeros(rows, columns // group)
    padded_scale[:out_features, : scale.shape[1]] = bf16_scale
    positions = positions_of(bitmask, in_features, rows, columns)
    return tiles_of([_pairs(padded_values), positions, padded_scale], tile_rows, tile_columns)


def unpack_int4(
    packed: Tensor, out_features: int, in_features: int, group: int = 128
) -> tuple[Tensor, Tensor, Tensor]:
    """The inverse of `pack_int4`: values int8, bitmask and scale bf16.

    Raises:
        PatternError: if the packed shape does not belong to these sizes.
    """
    shape = int4_packed_shape(out_features, in_features, group)
    if tuple(packed.shape) != shape:
        raise PatternError(
            f"packed weight is {list(packed.shape)}; a 4-bit [{out_features}, {in_features}] in "
            f"scale groups of {group} columns needs {list(shape)}"
        )
    sizes = [VALUES_BYTES, POSITIONS_BYTES, shape[2] - VALUES_BYTES - POSITIONS_BYTES]
    pairs, positions, scale = (rows_of(part) for part in packed.split(sizes, dim=2))
    values = _values(pairs)[:out_features, : in_features // 2].contiguous()
    bf16_scale = scale.view(torch.bfloat16)[:out_features, : -(-in_features // group)]
    return values, bitmask_of(positions, out_features, in_features), bf16_scale.contiguous()


def _pairs(values: Tensor) -> Tensor:
    """Kept weights, int8 [rows, 64 a tile] -> two to a byte, uint8 [rows, 32 a tile]."""
    kept = values.view(torch.uint8).unflatten(1, (-1, 4, 2, 2, 4))  # tile, a, b, c, d
    low, high = (kept & 0b1111).unbind(3)
    return (low | high << 4).transpose(2, 3).flatten(1)


def _values(pairs: Tensor) -> Tensor:
    """The inverse of `_pairs`."""
    both = pairs.unflatten(1, (-1, 2, 4, 4)).transpose(2, 3)  # tile, a, c, d
    kept = torch.stack([both << 4, both], dim=3).flatten(1)  # in the upper four bits
    return kept.view(torch.int8) >> 4


def linear24_int4(
    x: Tensor, packed: Tensor, group: int, out_features: int, bias: Tensor | None = None
) -> Tensor:
    """x @ (weight * scale).T + bias with 4-bit weights, x quantised token by token on the way.

    out[m, n] = (sum over the scale groups g of scale[n, g] * x_scale[m, g] * dot[m, n, g]) +
    bias[n], where x_scale is that of the 128 columns that g is in, dot is the exact sum of the
    integers' products, and all else is fp32. A kernel may multiply and add in another order.

    Args:
        x: [..., in_features], bf16, fp16 or fp32. A token that holds Inf or NaN gets NaN in all
            out_features.
        packed: see `pack_int4`.
        group: columns that share a scale, 128, 64 or 32.
        out_features: rows of the weight.
        bias: [out_features] or None.

    Returns:
        [..., out_features] in x's dtype.
    """
    in_features = x.shape[-1]
    values, bitmask, scale = unpack_int4(packed, out_features, in_features, group)
    padding = -in_features % INT8_TILE_COLUMNS
    weight = torch.nn.functional.pad(decompress(values, bitmask, in_features), (0, padding))
    integers, x_scale = quantize_groups(x)
    groups_of_x = INT8_TILE_COLUMNS // group
    num_groups = scale.shape[1]
    # A group's sum is below 2 ** 17, so fp32 products and sums are exact.
    dots = torch.einsum(
        "...gk,ngk->...ng",
        integers.flatten(-2).unflatten(-1, (-1, group)).float(),
        weight.unflatten(1, (-1, group)).float(),
    )
    x_scale = x_scale.repeat_interleave(groups_of_x, dim=-1).unsqueeze(-2)
    # Groups that begin past in_features are zeros; their x_scale decides nothing.
    out = ((dots * x_scale)[..., :num_groups] * scale.float()).sum(-1)
    if bias is not None:
        out = out + bias.float()
    return out.to(x.dtype)
