"""The specification of the kernels for weights that keep n of 64, in plain torch.

A *kept* number n of each 64 consecutive weights of a row are kept, the same n in a whole linear;
2:4, 4:8, ... and 32:64 are 32 of 64, and a dense weight of 4 bits, the output head's, is 64 of 64.
csrc/linear64.h draws the packed layout: tiles of 16 out_features by 64 in_features, by 128 of 8-bit
and 4-bit weights,

    values  kept weights in the order of the tile: columns in *steps* of 4 (8 and 4 bits), 2 (16
            bits) or 1 (32 bits); in a step row after row; 8 bits as value + 128; of 4 bits byte j
            has the j-th of the first 64 columns + 8 in its lower half, of the others in its upper
    masks   a bit for each weight in that order, 1 = kept; none where all 64 are kept
    scales  of 4 bits: bf16 [128 / scale group][16]

which at n = 32 are the bytes of 2:4. out_features and in_features are padded to whole tiles with
zero values.

A dropped weight is not multiplied: where x is Inf or NaN in a column that a row has dropped, that
row's output does not become NaN. With 8-bit and 4-bit weights x is quantised first, so Inf or NaN
makes the token's whole output NaN.
"""

import torch
from torch import Tensor

from cast_serve.errors import PatternError
from cast_serve.kernels.reference import INT8_TILE_COLUMNS, TILE_COLUMNS
from cast_serve.sparsity.bitmask import pack_mask, unpack_bits, unpack_mask
from cast_serve.sparsity.pattern import Pattern
from cast_serve.sparsity.quantize import INT4_SCALE_GROUPS, quantize_groups

TILE_ROWS64 = 16
SLAB_ROWS = 256 * TILE_ROWS64  # of a dense weight, packed at a time


def packed_shape64(
    out_features: int,
    in_features: int,
    kept: int,
    dtype: torch.dtype,
    scale_group: int | None = None,
) -> tuple[int, int, int]:
    """The shape of the packed weight in bytes.

    Args:
        kept: of 64 columns.
        dtype: of the values; int8 with 4 bits too.
        scale_group: of 4-bit weights, the columns that share a scale; else None.

    Raises:
        PatternError: if in_features is not a multiple of 64, or kept is not 1 to 63, or 64 with a
            scale_group.
        ValueError: if scale_group is not 128, 64 or 32.
    """
    if not 0 < kept < TILE_COLUMNS + (scale_group is not None):
        raise PatternError(f"{kept} of 64 columns are kept; 1 to 63 is needed, or 64 in 4 bits")
    if in_features <= 0 or in_features % TILE_COLUMNS:
        raise PatternError(
            f"in_features {in_features} is not a positive multiple of 64, which {kept} of 64 needs"
        )
    columns = INT8_TILE_COLUMNS if dtype == torch.int8 else TILE_COLUMNS
    row_bytes = columns // 64 * kept * dtype.itemsize + (columns // 8 if kept < TILE_COLUMNS else 0)
    if scale_group is not None:
        if scale_group not in INT4_SCALE_GROUPS:
            raise ValueError(f"a scale group of {scale_group} columns is none of 128, 64 and 32")
        row_bytes += columns // scale_group * 2 - kept
    return -(-out_features // TILE_ROWS64), -(-in_features // columns), TILE_ROWS64 * row_bytes


def pack64(
    values: Tensor,
    bitmask: Tensor | None,
    scale: Tensor | None = None,
    scale_group: int | None = None,
) -> Tensor:
    """A compressed weight that keeps n of 64 -> packed weight.

    Args:
        values: [out_features, in_features * n / 64], bf16, fp16, fp32 or int8; of 4 bits int8 from
            -8 to 7.
        bitmask: uint8 [out_features, in_features / 8], n bits in each 8 bytes; None: all are kept.
        scale: of 4 bits, [out_features, ceil(in_features / scale_group)], finite; kept in bf16.
        scale_group: of 4 bits, the columns that share a scale; else None.

    Returns:
        uint8 [tile_rows, tile_columns, tile_bytes], contiguous, as `packed_shape64`.

    Raises:
        PatternError: if the shapes do not belong together, or a word of the bitmask has another
            number of bits.
        ValueError: if a 4-bit value or a scale is out of range.
    """
    out_features, in_features = len(values), values.shape[1]
    if bitmask is not None:
        in_features = bitmask.shape[1] * 8
    kept = values.shape[1] * 64 // in_features
    shape = packed_shape64(out_features, in_features, kept, values.dtype, scale_group)
    if values.is_meta:
        return torch.empty(shape, dtype=torch.uint8, device="meta")
    columns = INT8_TILE_COLUMNS if values.dtype == torch.int8 else TILE_COLUMNS
    rows, padded = shape[0] * TILE_ROWS64, shape[1] * columns
    dense = values.new_zeros(rows, padded)
    mask = None if bitmask is None else _padded_mask(bitmask, kept, rows, padded)
    if mask is None or kept == TILE_COLUMNS:
        dense[:out_features, :in_features] = values
        ordered = _in_order(dense, values.dtype).flatten(2)
    else:
        dense[:out_features, :in_features].masked_scatter_(
            mask[:out_features, :in_features], values
        )
        in_order = _in_order(mask, values.dtype).contiguous()
        ordered = _select(_in_order(dense, values.dtype), in_order).view(shape[0], shape[1], -1)
    if scale_group is None:
        parts = [(ordered ^ -128) if values.dtype == torch.int8 else ordered]
    else:
        if scale is None or tuple(scale.shape) != (out_features, -(-in_features // scale_group)):
            raise ValueError(
                f"scale is {None if scale is None else list(scale.shape)}; "
                f"[{out_features}, {-(-in_features // scale_group)}] is needed"
            )
        _check_int4(values)
        low, high = (ordered + 8).view(torch.uint8).chunk(2, dim=2)
        parts = [low | high << 4]
    if kept < TILE_COLUMNS:
        parts.append(pack_mask(in_order.flatten(2)))
    if scale_group is not None and scale is not None:
        if not scale.bfloat16().isfinite().all():
            raise ValueError("a scale is not finite in bf16: convert the model again")
        of_rows = scale.new_zeros(rows, padded // scale_group, dtype=torch.bfloat16)
        of_rows[:out_features, : scale.shape[1]] = scale
        parts.append(of_rows.view(shape[0], TILE_ROWS64, shape[1], -1).permute(0, 2, 3, 1))
    return torch.cat([p.contiguous().view(torch.uint8).flatten(2) for p in parts], 2).contiguous()


def pack_dense_int4(values: Tensor, scale: Tensor, scale_group: int) -> Tensor:
    """A dense 4-bit weight [out_features, in_features] -> packed weight that keeps 64 of 64.

    Args and errors are those of `pack64`. Some rows at a time: an output head is large.
    """
    slabs = zip(values.split(SLAB_ROWS), scale.split(SLAB_ROWS), strict=True)
    return torch.cat([pack64(rows, None, scales, scale_group) for rows, scales in slabs])


def unpack64(
    packed: Tensor,
    out_features: int,
    in_features: int,
    kept: int,
    dtype: torch.dtype,
    scale_group: int | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The inverse of `pack64`: the dense weight, its mask and, of 4 bits, its scales in bf16.

    Returns:
        weight [out_features, in_features] in `dtype`, mask bool of that shape, and scale
        [out_features, ceil(in_features / scale_group)] or None.

    Raises:
        PatternError: if the packed shape does not belong to these sizes.
    """
    shape = packed_shape64(out_features, in_features, kept, dtype, scale_group)
    if tuple(packed.shape) != shape:
        raise PatternError(
            f"packed weight is {list(packed.shape)}; {kept} of 64 of [{out_features}, "
            f"{in_features}] in {dtype} needs {list(shape)}"
        )
    columns = INT8_TILE_COLUMNS if dtype == torch.int8 else TILE_COLUMNS
    mask_bytes = TILE_ROWS64 * columns // 8 if kept < TILE_COLUMNS else 0
    scale_bytes = 0 if scale_group is None else TILE_ROWS64 * columns // scale_group * 2
    sizes = [shape[2] - mask_bytes - scale_bytes, mask_bytes, scale_bytes]
    values, masks, scales = packed.split(sizes, dim=2)
    step_columns = 4 // dtype.itemsize
    in_order = torch.ones(
        *shape[:2], columns // step_columns, TILE_ROWS64, step_columns, dtype=torch.bool
    )
    if mask_bytes:
        in_order = unpack_bits(masks.flatten(0, 1), mask_bytes * 8).view(in_order.shape)
    if scale_group is not None:
        values = torch.cat([values & 15, values >> 4], dim=2).view(torch.int8) - 8
    elif dtype == torch.int8:
        values = values.contiguous().view(torch.int8) ^ -128
    dense = torch.zeros(in_order.shape, dtype=dtype)
    dense.masked_scatter_(in_order, values.contiguous().view(dtype))
    scale = None
    if scale_group is not None:
        of_tiles = scales.contiguous().view(torch.bfloat16)
        of_rows = of_tiles.view(*shape[:2], -1, TILE_ROWS64).permute(0, 3, 1, 2).flatten(2)
        scale = of_rows.flatten(0, 1)[:out_features, : -(-in_features // scale_group)].contiguous()
    weight, mask = (
        tensor.permute(0, 3, 1, 2, 4).flatten(2).flatten(0, 1)[:out_features, :in_features]
        for tensor in (dense, in_order)
    )
    return weight.contiguous(), mask.contiguous(), scale


def linear64(
    x: Tensor,
    packed: Tensor,
    kept: int,
    out_features: int,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    scale_group: int = 0,
) -> Tensor:
    """x @ weight.T + bias with fp32 sums, for a weight that `pack64` made.

    With integer weights x is quantised token by token on the way, as in `reference.linear24_int8`
    and `reference_int4.linear24_int4`.

    Args:
        x: [..., in_features], bf16, fp16 or fp32; also the dtype of weights that are not integers.
        packed: see `pack64`.
        kept: of 64 columns.
        out_features: rows of the weight.
        bias: [out_features] or None.
        scale: of 8-bit weights, fp32 [out_features]; else None.
        scale_group: of 4-bit weights, the columns that share a scale; else 0.

    Returns:
        [..., out_features] in x's dtype.
    """
    is_integer = scale is not None or scale_group > 0
    weight, mask, int4_scale = unpack64(
        packed,
        out_features,
        x.shape[-1],
        kept,
        torch.int8 if is_integer else x.dtype,
        scale_group or None,
    )
    if is_integer:
        padded = torch.nn.functional.pad(weight.float(), (0, -x.shape[-1] % INT8_TILE_COLUMNS))
        group = scale_group or INT8_TILE_COLUMNS
        integers, x_scale = quantize_groups(x)
        # A group's sum is below 2 ** 21, so fp32 products and sums are exact.
        dots = torch.einsum(
            "...gk,ngk->...ng",
            integers.flatten(-2).unflatten(-1, (-1, group)).float(),
            padded.unflatten(1, (-1, group)),
        )
        of_x = x_scale.repeat_interleave(INT8_TILE_COLUMNS // group, dim=-1).unsqueeze(-2)
        out = dots * of_x
        if int4_scale is not None:
            out = (out[..., : int4_scale.shape[1]] * int4_scale.float()).sum(-1)
        else:
            assert scale is not None
            out = out.sum(-1) * scale
    else:
        rows = x.float().unsqueeze(-2)
        if x.isfinite().all():
            out = x.float() @ weight.float().T
        else:
            out = torch.where(mask, rows * weight.float(), 0.0).sum(-1)
    if bias is not None:
        out = out + bias.float()
    return out.to(x.dtype)


def _padded_mask(bitmask: Tensor, kept: int, rows: int, columns: int) -> Tensor:
    """uint8 [out_features, in_features / 8] -> bool [rows, columns], padding keeps the first.

    Raises:
        PatternError: if a word has not `kept` bits.
    """
    found = unpack_mask(bitmask, bitmask.shape[1] * 8, pattern=Pattern(kept, TILE_COLUMNS))
    mask = (torch.arange(columns, device=bitmask.device) % 64 < kept).repeat(rows, 1)
    mask[: len(found), : found.shape[1]] = found
    return mask


def _in_order(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """[tile_rows * 16, columns] -> [tile_rows, tile_columns, steps, 16, columns of a step]."""
    columns = INT8_TILE_COLUMNS if dtype == torch.int8 else TILE_COLUMNS
    step_columns = 4 // dtype.itemsize
    tiles = rows.view(
        -1, TILE_ROWS64, rows.shape[1] // columns, columns // step_columns, step_columns
    )
    return tiles.permute(0, 2, 3, 1, 4)


def _select(tensor: Tensor, mask: Tensor) -> Tensor:
    """tensor[mask], [mask.sum()], by NumPy: in a third of torch's time, on CPUs alone.

    Args:
        tensor: bf16, fp16, fp32 or int8, of mask's shape.
        mask: bool, contiguous.
    """
    integers = tensor.contiguous().view(getattr(torch, f"int{8 * tensor.itemsize}"))
    return torch.from_numpy(integers.numpy()[mask.numpy()]).view(tensor.dtype)


def _check_int4(values: Tensor) -> None:
    if values.numel() and not -8 <= int(values.min()) <= int(values.max()) <= 7:
        raise ValueError(
            f"values are {int(values.min())} to {int(values.max())}; 4 bits hold -8 to 7: pack "
            "8-bit values without a scale group"
        )
