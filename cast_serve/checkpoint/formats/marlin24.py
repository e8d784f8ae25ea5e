"""A linear of ``marlin-24`` -> its kept values, bitmask and scales, row by row.

compressed-tensors up to 0.14 wrote 2:4 weights in the order in which a CUDA kernel read them. For
a weight [N, K] of b bits, 4 or 8 (integers.py says how they are packed), N a multiple of 64 and K
of 32:
    weight_packed  int32 [K / 32, N * b / 2]   kept values
    meta           int16 [K / 32, 2 * N]       of each group two 2-bit columns, the lower one first
    scale_packed   fp16  [K / 128 or 1, N]

Its order permutes the bits of an element's index, so undoing it is a view, a permute and a reshape.
Below, a letter is a digit of an index and has so many values; the first one is the highest:
    weight_packed, tiles of 64 rows by 16 kept values: row o p q j, kept value h i l
        4 bits: o[4] p[2] i[4] j[4] l[2] q[2] h[2]      8 bits: o[4] p[2] i[4] j[4] q[2] l[2] h[2]
    meta, tiles of 64 rows by 2 elements of 16 columns: row e d b a, element c
        b[2] e[8] a[2] c[2] d[2]
    scale_packed, tiles of 8 rows: row d a
        a[4] d[2]; but in order where a row has one scale, or two for 256 columns
Source: permutations_24.py and semi_structured_conversions.py of compressed-tensors 0.12.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from cast_serve.checkpoint.declared import MARLIN
from cast_serve.checkpoint.formats.integers import Integers, check_scales, unpack
from cast_serve.checkpoint.formats.packed import Packed
from cast_serve.checkpoint.record import CheckpointError
from cast_serve.sparsity.bitmask import unpack_mask

PARTS = ("weight_packed", "scale_packed", "meta")
SCALE_GROUP = 128
VALUE_ORDER = {4: (1, 2, 3, 7, 5, 0, 8, 4, 6), 8: (1, 2, 3, 6, 5, 0, 8, 4, 7)}  # by bits
META_ORDER = (1, 3, 6, 2, 4, 0, 5)
UNORDERED_COLUMNS = 256  # up to which scales are in order


def read(name: str, parts: Mapping[str, Tensor]) -> Integers:
    """One linear out of its stored tensors.

    Args:
        name: the linear's.
        parts: its tensors by the last word of their names.

    Raises:
        CheckpointError: if one is missing, or of another dtype or shape than it must be, or a scale
            is not finite and positive; naming it.
        PatternError: if meta does not keep two of each four.
    """
    if missing := [part for part in PARTS if part not in parts]:
        raise CheckpointError(
            f"{name} lacks {', '.join(missing)} of marlin-24; the checkpoint is incomplete: "
            "copy the directory again"
        )
    packed, scale, meta = (parts[part].contiguous() for part in PARTS)
    num_rows, num_columns, num_bits = _shape(name, packed, scale, meta)
    tiles = num_columns // 32, num_rows // 64
    octets = meta.view(*tiles, 2, 8, 2, 2, 2).permute(META_ORDER)
    octets = octets.reshape(num_rows, num_columns // 16).view(torch.uint8)
    bitmask = _bits_of_columns()[octets.int()]
    unpack_mask(bitmask, num_columns, f"{name}.meta")
    values = unpack(packed, num_bits).view(*tiles, 4, 2, 4, 4, 2, 2, 2)
    values = values.permute(VALUE_ORDER[num_bits]).reshape(num_rows, num_columns // 2)
    if len(scale) > 1 and num_columns > UNORDERED_COLUMNS:
        scale = scale.view(len(scale), -1, 4, 2).transpose(2, 3).reshape(scale.shape)
    scale = scale.T.contiguous()
    check_scales(f"{name}.scale_packed", scale)
    return Integers(values, bitmask, scale, num_bits)


def _shape(name: str, packed: Tensor, scale: Tensor, meta: Tensor) -> tuple[int, int, int]:
    """out_features, in_features and bits, of tensors that belong together."""
    stored = packed, scale, meta
    if all(tensor.dim() == 2 and tensor.numel() for tensor in stored):
        num_rows, num_columns = meta.shape[1] // 2, 32 * len(meta)
        num_bits = packed.shape[1] * 2 // max(1, num_rows)
        if (
            [tensor.dtype for tensor in stored] == [torch.int32, torch.float16, torch.int16]
            and num_bits in VALUE_ORDER
            and num_rows % 64 == 0
            and meta.shape[1] == 2 * num_rows
            and list(packed.shape) == [len(meta), num_rows * num_bits // 2]
            and scale.shape[1] == num_rows
            and (len(scale) == 1 or len(scale) * SCALE_GROUP == num_columns)
        ):
            return num_rows, num_columns, num_bits
    found = ", ".join(
        f"{part} {tensor.dtype} {list(tensor.shape)}"
        for part, tensor in zip(PARTS, stored, strict=True)
    )
    raise CheckpointError(
        f"{name}: {found} do not belong together; a weight [N, K] of 4 or 8 bits has in marlin-24 "
        "torch.int32 [K / 32, 2 N or 4 N], torch.float16 [K / 128 or 1, N] and torch.int16 "
        "[K / 32, 2 N], with N a multiple of 64: copy the directory again"
    )


def _bits_of_columns() -> Tensor:
    """uint8 [256]: a byte of meta -> one of the bitmask; none where columns are not in order."""
    group = [
        1 << lower | 1 << upper if lower < upper else 0 for upper in range(4) for lower in range(4)
    ]
    return torch.tensor([high << 4 | low for high in group for low in group], dtype=torch.uint8)


class Marlin24(Packed):
    """Values and positions in the order in which a CUDA kernel read them."""

    declared_format = MARLIN
    read_integers = staticmethod(read)
