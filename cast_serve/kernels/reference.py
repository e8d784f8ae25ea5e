"""The specification of the kernels in plain torch: packed layout, pack, unpack and the 2:4 linear.

A packed weight is uint8 [tile_rows, tile_columns, tile_bytes], a tile being 8 out_features by 64
in_features (csrc/linear24.h draws it):

    bytes 0 .. 256 * itemsize - 1    values: 8 rows of 32 kept weights, row after row
    the last 64 bytes                positions: 8 rows of 64 bits, 4 bits a group

out_features and in_features are padded to whole tiles with zero values at columns 0 and 1.
A dropped weight is not multiplied at all: where x is Inf or NaN in a column that a row has dropped,
that row's output does not become NaN, as it would by 0 * Inf in a dense product.
"""

import torch
from torch import Tensor

from cast_serve.sparsity.bitmask import decompress, unpack_mask
from cast_serve.sparsity.pattern import PatternError

TILE_ROWS = 8
TILE_COLUMNS = 64
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
    """The shape of the packed weight in bytes."""
    tile_bytes = TILE_ROWS * (TILE_COLUMNS // 2 * dtype.itemsize + 8)
    return -(-out_features // TILE_ROWS), -(-in_features // TILE_COLUMNS), tile_bytes


def pack(values: Tensor, bitmask: Tensor) -> Tensor:
    """Compressed weight -> packed weight.

    Args:
        values: [out_features, in_features / 2], bf16, fp16 or fp32.
        bitmask: uint8 [out_features, ceil(in_features / 8)]; bits past in_features may be set.

    Returns:
        uint8 [tile_rows, tile_columns, tile_bytes], contiguous.

    Raises:
        PatternError: if a group has not exactly two bits.
    """
    out_features, in_features = values.shape[0], values.shape[1] * 2
    tile_rows, tile_columns, _ = packed_shape(out_features, in_features, values.dtype)
    if values.is_meta:
        shape = packed_shape(out_features, in_features, values.dtype)
        return torch.empty(shape, dtype=torch.uint8, device="meta")
    unpack_mask(bitmask, in_features)  # raises where it is not 2:4
    bits = bitmask.clone()
    if in_features % 8:  # files of other tools may have any bits in the upper nibble
        bits[:, -1] = (bits[:, -1] & 0b0000_1111) | 0b0011_0000
    positions = POSITIONS_OF_BITMASK.to(bits.device)[bits.long()]

    rows = tile_rows * TILE_ROWS
    padded_values = values.new_zeros(rows, tile_columns * TILE_COLUMNS // 2)
    padded_values[:out_features, : values.shape[1]] = values
    padded_positions = positions.new_full((rows, tile_columns * 8), PADDING_POSITIONS)
    padded_positions[:out_features, : positions.shape[1]] = positions
    tiles = [
        part.contiguous().view(torch.uint8).view(tile_rows, TILE_ROWS, tile_columns, -1)
        for part in (padded_values, padded_positions)
    ]
    return torch.cat([tile.transpose(1, 2).flatten(2) for tile in tiles], dim=2).contiguous()


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
    rows = shape[0] * TILE_ROWS

    def rows_of(part: Tensor) -> Tensor:
        return part.unflatten(2, (TILE_ROWS, -1)).transpose(1, 2).reshape(rows, -1)

    values = rows_of(packed[..., : shape[2] - 64]).view(dtype)
    positions = rows_of(packed[..., shape[2] - 64 :])
    bitmask = BITMASK_OF_POSITIONS.to(packed.device)[positions.long()]
    bitmask = bitmask[:out_features, : -(-in_features // 8)].clone()
    if in_features % 8:
        bitmask[:, -1] &= 0b0000_1111
    return values[:out_features, : in_features // 2].contiguous(), bitmask


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
