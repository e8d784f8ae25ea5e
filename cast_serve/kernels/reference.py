"""The specification of the kernels in plain torch: packed layout, pack, unpack and the 2:4 linears.

A packed weight is uint8 [tile_rows, tile_columns, tile_bytes], a tile being 8 out_features by 64
in_features, or by 128 of an int8 weight (csrc/linear24.h draws it):

    first    values: 8 rows of 32 kept weights (int8: 64), row after row
    then     positions: 8 rows of 64 bits (int8: 128), 4 bits a group, row after row

out_features and in_features are padded to whole tiles with zero values at columns 0 and 1.
A dense int8 weight, the output head's, has tiles of 8 rows of 128 weights, row after row.

A dropped weight is not multiplied at all: where x is Inf or NaN in a column that a row has dropped,
that row's output does not become NaN, as it would by 0 * Inf in a dense product. An int8 weight is
different: there x is quantised first, so Inf or NaN makes the whole output row NaN.
"""

import torch
from torch import Tensor

from cast_serve.sparsity.bitmask import decompress, unpack_mask
from cast_serve.sparsity.pattern import PatternError
from cast_serve.sparsity.quantize import SCALE_GROUP, quantize_groups

TILE_ROWS = 8
TILE_COLUMNS = 64  # of bf16, fp16 and fp32
INT8_TILE_COLUMNS = SCALE_GROUP  # a tile is a scale group of the activations
PADDING_POSITIONS = 0b0100_0100  # two groups that keep columns 0 and 1


def _position_tables() -> tuple[Tensor, Tensor]:
    """Bitmask byte (two groups) -> positions byte, and back; 0 where the byte is not 2:4."""
    positions = torch.zeros(256, dtype=torch.uint8)
    bitmasks = torch.zeros(256, dtype=torch.uint8)
    pairs = [(a, b) for a in range(4) for b in range(a + 1, 4)]
    for low in pairs:
        for high in pairs:
            bits = sum(1 << column for column in low) | sum(16 << column for column in high)
            code = low[0] | low[1] << 2 | high[0] << 4 | high[1] << 6
            positions[bits], bitmasks[code] = code, bits
    return positions, bitmasks


POSITIONS_OF_BITMASK, BITMASK_OF_POSITIONS = _position_tables()


def packed_shape(out_features: int, in_features: int, dtype: torch.dtype) -> tuple[int, int, int]:
    """The shape of the packed weight in bytes; `dtype` is the weight's."""
    columns = _tile_columns(dtype)
    tile_bytes = TILE_ROWS * (columns // 2 * dtype.itemsize + columns // 8)
    return -(-out_features // TILE_ROWS), -(-in_features // columns), tile_bytes


def _tile_columns(dtype: torch.dtype) -> int:
    return INT8_TILE_COLUMNS if dtype == torch.int8 else TILE_COLUMNS


def pack(values: Tensor, bitmask: Tensor) -> Tensor:
    """Compressed weight -> packed weight.

    Args:
        values: [out_features, in_features / 2], bf16, fp16, fp32 or int8.
        bitmask: uint8 [out_features, ceil(in_features / 8)]; bits past in_features may be set.

    Returns:
        uint8 [tile_rows, tile_columns, tile_bytes], contiguous.

    Raises:
        PatternError: if a group has not exactly two bits.
    """
    out_features, in_features = values.shape[0], values.shape[1] * 2
    shape = packed_shape(out_features, in_features, values.dtype)
    if values.is_meta:
        return torch.empty(shape, dtype=torch.uint8, device="meta")
    tile_rows, tile_columns, _ = shape
    rows, columns = tile_rows * TILE_ROWS, tile_columns * _tile_columns(values.dtype)
    padded_values = values.new_zeros(rows, columns // 2)
    padded_values[:out_features, : values.shape[1]] = values
    return tiles_of(
        [padded_values, positions_of(bitmask, in_features, rows, columns)], tile_rows, tile_columns
    )


def positions_of(bitmask: Tensor, in_features: int, rows: int, columns: int) -> Tensor:
    """Bitmask -> positions, uint8 [rows, columns / 8]; what is padded keeps columns 0 and 1.

    Raises:
        PatternError: if a group has not exactly two bits.
    """
    unpack_mask(bitmask, in_features)  # raises where it is not 2:4
    bits = bitmask.clone()
    if in_features % 8:  # files of other tools may have any bits in the upper nibble
        bits[:, -1] = (bits[:, -1] & 0b0000_1111) | 0b0011_0000
    positions = POSITIONS_OF_BITMASK.to(bits.device)[bits.long()]
    padded = positions.new_full((rows, columns // 8), PADDING_POSITIONS)
    padded[: positions.shape[0], : positions.shape[1]] = positions
    return padded


def tiles_of(parts: list[Tensor], tile_rows: int, tile_columns: int) -> Tensor:
    """Rows [tile_rows * 8, ...] of any dtypes -> uint8 [tile_rows, tile_columns, tile_bytes]."""
    tiles = [
        part.contiguous().view(torch.uint8).view(tile_rows, TILE_ROWS, tile_columns, -1)
        for part in parts
    ]
    return torch.cat([tile.transpose(1, 2).flatten(2) for tile in tiles], dim=2).contiguous()


def rows_of(tiles: Tensor) -> Tensor:
    """One part of all tiles, [tile_rows, tile_columns, bytes] -> its rows, uint8."""
    return tiles.unflatten(2, (TILE_ROWS, -1)).transpose(1, 2).flatten(2).flatten(0, 1)


def bitmask_of(positions: Tensor, out_features: int, in_features: int) -> Tensor:
    """The inverse of `positions_of`."""
    bitmask = BITMASK_OF_POSITIONS.to(positions.device)[positions.long()]
    bitmask = bitmask[:out_features, : -(-in_features // 8)].clone()
    if in_features % 8:
        bitmask[:, -1] &= 0b0000_1111
    return bitmask


def unpack(
    packed: Tensor, out_features: int, in_features: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The inverse of `pack`: values and bitmask, bit for bit.

    Raises:
        PatternError: if the packed shape does not belong to these sizes.
    """
    shape = packed_shape(out_features, in_features, dtype)
    if tuple(packed.shape) != shape:
        raise PatternError(
            f"packed weight is {list(packed.shape)}; [{out_features}, {in_features}] in {dtype} "
            f"needs {list(shape)}"
        )
    values_bytes = shape[2] - TILE_ROWS * _tile_columns(dtype) // 8
    values = rows_of(packed[..., :values_bytes]).view(dtype)
    bitmask = bitmask_of(rows_of(packed[..., values_bytes:]), out_features, in_features)
    return values[:out_features, : in_features // 2].contiguous(), bitmask


def packed_dense_shape(out_features: int, in_features: int) -> tuple[int, int, int]:
    """The shape of a packed dense int8 weight in bytes."""
    tile_rows, tile_columns, _ = packed_shape(out_features, in_features, torch.int8)
    return tile_rows, tile_columns, TILE_ROWS * INT8_TILE_COLUMNS


def pack_dense(weight: Tensor) -> Tensor:
    """Dense int8 weight [out_features, in_features] -> packed weight, as `packed_dense_shape`."""
    tile_rows, tile_columns, _ = packed_dense_shape(*weight.shape)
    padded = weight.new_zeros(tile_rows * TILE_ROWS, tile_columns * INT8_TILE_COLUMNS)
    padded[: weight.shape[0], : weight.shape[1]] = weight
    return tiles_of([padded], tile_rows, tile_columns)


def unpack_dense(packed: Tensor, out_features: int, in_features: int) -> Tensor:
    """The inverse of `pack_dense`: int8 [out_features, in_features].

    Raises:
        PatternError: if the packed shape does not belong to these sizes.
    """
    shape = packed_dense_shape(out_features, in_features)
    if tuple(packed.shape) != shape:
        raise PatternError(
            f"packed weight is {list(packed.shape)}; a dense int8 [{out_features}, {in_features}] "
            f"needs {list(shape)}"
        )
    return rows_of(packed)[:out_features, :in_features].contiguous().view(torch.int8)


def linear24(x: Tensor, packed: Tensor, out_features: int, bias: Tensor | None = None) -> Tensor:
    """x @ weight.T + bias with fp32 accumulation.

    Args:
        x: [..., in_features], bf16, fp16 or fp32; also the weight's dtype.
        packed: see `pack`.
        out_features: rows of the weight.
        bias: [out_features] or None.

    Returns:
        [..., out_features] in x's dtype.
    """
    in_features = x.shape[-1]
    values, bitmask = unpack(packed, out_features, in_features, x.dtype)
    weight = decompress(values, bitmask, in_features)
    out = x.float() @ weight.float().T
    if bias is not None:
        out = out + bias.float()
    return out.to(x.dtype)


def linear24_int8(
    x: Tensor, packed: Tensor, scale: Tensor, out_features: int, bias: Tensor | None = None
) -> Tensor:
    """x @ (weight * scale).T + bias with int8 weights, x quantised token by token on the way.

    out[m, n] = scale[n] * (sum over the scale groups g of x_scale[m, g] * dot[m, n, g]) + bias[n],
    where dot is the exact sum of the integers' products and all else is fp32. A kernel may add the
    groups in another order.

    Args:
        x: [..., in_features], bf16, fp16 or fp32. A token that holds Inf or NaN gets NaN in all
            out_features.
        packed: see `pack`, of int8 values within +-127.
        scale: fp32 [out_features], finite.
        out_features: rows of the weight.
        bias: [out_features] or None.

    Returns:
        [..., out_features] in x's dtype.
    """
    in_features = x.shape[-1]
    values, bitmask = unpack(packed, out_features, in_features, torch.int8)
    return _linear_int8(x, decompress(values, bitmask, in_features), scale, bias)


def linear_int8(
    x: Tensor, packed: Tensor, scale: Tensor, out_features: int, bias: Tensor | None = None
) -> Tensor:
    """As `linear24_int8`, with a dense weight; packed: see `pack_dense`."""
    return _linear_int8(x, unpack_dense(packed, out_features, x.shape[-1]), scale, bias)


def _linear_int8(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    weight = torch.nn.functional.pad(weight.float(), (0, -x.shape[-1] % INT8_TILE_COLUMNS))
    integers, x_scale = quantize_groups(x)
    # A group's sum is below 2 ** 21, so fp32 products and sums are exact.
    dots = torch.einsum(
        "...gk,ngk->...ng", integers.float(), weight.unflatten(1, (-1, INT8_TILE_COLUMNS))
    )
    out = (dots * x_scale.unsqueeze(-2)).sum(-1) * scale
    if bias is not None:
        out = out + bias.float()
    return out.to(x.dtype)
