"""The bitmask codec: a weight of N of 64, or 2:4 <-> its kept values and one bit per weight.

On disk, for a weight [out_features, in_features]:
    values   [out_features, in_features N / M]       the weight's dtype, kept weights left to right
    bitmask  [out_features, ceil(in_features / 8)]   uint8, bit i of byte j = column 8j + i

Every word of 64 columns, 8 bytes of the bitmask, has exactly N bits set; in_features is a multiple
of 64. N:M with a smaller M is stored as N * 64 / M of 64. 2:4 alone (``sparse-24-bitmask``) is not:
every nibble of its bitmask that belongs to a group has exactly two bits, and in_features is a
multiple of 4. Where it is not one of 8, the last byte's upper nibble belongs to no group: it is
written as 0 and ignored on reading.

A kept value may itself be 0: a group with fewer than N non-zeros keeps its first zeros. `compress`
and `decompress` are pure and work on the meta device.
Source of the 2:4 codec: compressed-tensors up to 0.14, vLLM 0.7 to 0.18.
"""

import torch
from torch import Tensor

from cast_serve.sparsity.pattern import (
    TWO_FOUR,
    Pattern,
    PatternError,
    check_weight,
    groups,
    hard_mask,
)

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.int8)


def compress(
    weight: Tensor, name: str = "weight", pattern: Pattern = TWO_FOUR
) -> tuple[Tensor, Tensor]:
    """Compresses a weight with its zeros.

    Args:
        weight: [out_features, in_features], floating point or int8.
        name: for error messages.
        pattern: what it must have, in groups of its own M.

    Returns:
        values [out_features, in_features N / M] and bitmask [out_features, ceil(in_features / 8)].
        -0.0 is stored as 0.0.

    Raises:
        PatternError: if weight has another dtype or shape, in_features has no whole words (2:4:
            groups), or a group has more than N non-zeros.
    """
    if weight.dim() != 2 or weight.numel() == 0 or weight.dtype not in DTYPES:
        raise PatternError(
            f"{name} is {weight.dtype} {list(weight.shape)}, which is not a weight [out_features, "
            "in_features] in bf16, fp16, fp32 or int8"
        )
    out_features, in_features = weight.shape
    stored = pattern.stored
    if in_features % stored.m:
        raise PatternError(
            f"{name}: in_features {in_features} is not a multiple of {stored.m}, so it cannot be "
            f"stored as {stored}; leave it dense"
        )
    kept = in_features * stored.n // stored.m
    if weight.is_meta:
        return (
            weight.new_empty(out_features, kept),
            weight.new_empty(out_features, -(-in_features // 8), dtype=torch.uint8),
        )
    check_weight(weight, pattern, name)
    mask = hard_mask((weight != 0).to(torch.uint8), pattern)
    values = weight[mask].view(out_features, kept)
    values = torch.where(values == 0, torch.zeros_like(values), values)
    return values, pack_mask(mask)


def decompress(
    values: Tensor,
    bitmask: Tensor,
    in_features: int,
    name: str = "weight",
    pattern: Pattern = TWO_FOUR,
) -> Tensor:
    """The inverse of `compress`: the dense weight [out_features, in_features].

    Raises:
        PatternError: if the shapes do not belong together, or a word's bits (2:4: a group's) are
            not exactly N.
    """
    stored = pattern.stored
    out_features = values.shape[0] if values.dim() else 0
    kept = in_features * stored.n // stored.m
    expected = (out_features, kept), (out_features, -(-in_features // 8))
    if (
        (tuple(values.shape), tuple(bitmask.shape)) != expected
        or in_features % stored.m
        or in_features <= 0
    ):
        raise PatternError(
            f"{name}: values {list(values.shape)} and bitmask {list(bitmask.shape)} do not belong "
            f"to [{out_features}, {in_features}] as {stored}; {list(expected[0])} and "
            f"{list(expected[1])}, with in_features a multiple of {stored.m}, do"
        )
    dense = values.new_zeros(out_features, in_features)
    if values.is_meta:
        return dense
    mask = unpack_mask(bitmask, in_features, name, stored)
    return dense.masked_scatter_(mask, values)  # dense[mask] makes int64 indices


def pack_mask(mask: Tensor) -> Tensor:
    """bool [out_features, in_features] -> uint8 [out_features, ceil(in_features / 8)]."""
    bits = torch.nn.functional.pad(mask, (0, -mask.shape[-1] % 8)).unflatten(-1, (-1, 8))
    weights = 1 << torch.arange(8, dtype=torch.uint8, device=mask.device)
    return (bits * weights).sum(-1, dtype=torch.uint8)


def unpack_bits(bitmask: Tensor, in_features: int, name: str = "weight") -> Tensor:
    """The inverse of `pack_mask`, with any number of bits.

    Raises:
        PatternError: if its dtype or shape is not that of a bitmask of in_features columns.
    """
    is_bytes = bitmask.dim() == 2 and bitmask.dtype == torch.uint8
    if not is_bytes or in_features <= 0 or bitmask.shape[1] != -(-in_features // 8):
        raise PatternError(
            f"{name}: {bitmask.dtype} {list(bitmask.shape)} is not a bitmask of {in_features} "
            f"columns: uint8 with {-(-in_features // 8)} bytes a row is"
        )
    shifts = torch.arange(8, dtype=torch.uint8, device=bitmask.device)
    bits = (bitmask.unsqueeze(-1) >> shifts) & 1
    return bits.flatten(-2)[..., :in_features].bool()


def unpack_mask(
    bitmask: Tensor, in_features: int, name: str = "weight", pattern: Pattern = TWO_FOUR
) -> Tensor:
    """The inverse of `pack_mask`.

    Raises:
        PatternError: if its dtype or shape is not that of a bitmask of in_features columns, or a
            word (2:4: a group) does not have exactly N bits.
    """
    stored = pattern.stored
    mask = unpack_bits(bitmask, in_features, name)
    num_bits = groups(mask, stored.m).sum(-1)
    bad = num_bits != stored.n
    if bad.any():
        row, group = bad.nonzero()[0].tolist()
        what = "group" if stored == TWO_FOUR else "word"
        raise PatternError(
            f"{name}: {int(bad.sum())} {what}s of the bitmask do not have exactly {stored.n} of "
            f"{stored.m} bits; the first is row {row}, {what} {group}, with "
            f"{int(num_bits[row, group])}; the file is damaged or not {stored}: copy the directory "
            f"again, or prune the model to {stored} first"
        )
    return mask
