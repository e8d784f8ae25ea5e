"""The ``sparse-24-bitmask`` codec: a 2:4 weight <-> its kept values and one bit per weight.

On disk, for a weight [out_features, in_features]:
    values   [out_features, in_features / 2]         the weight's dtype, kept weights left to right
    bitmask  [out_features, ceil(in_features / 8)]   uint8, bit i of byte j = column 8j + i

Every nibble of the bitmask that belongs to a group has exactly two bits set. Where in_features is
no multiple of 8, the last byte's upper nibble belongs to no group: it is written as 0 and ignored
on reading. A kept value may itself be 0: a group with fewer than two non-zeros keeps its first
zeros. `compress` and `decompress` are pure and work on the meta device.
Source: compressed-tensors up to 0.14, vLLM 0.7 to 0.18.
"""

import torch
from torch import Tensor

from cast_serve.sparsity.pattern import TWO_FOUR, PatternError, check_weight, groups, hard_mask

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.int8)


def compress(weight: Tensor, name: str = "weight") -> tuple[Tensor, Tensor]:
    """Compresses a 2:4 weight.

    Args:
        weight: [out_features, in_features], floating point or int8.
        name: for error messages.

    Returns:
        values [out_features, in_features / 2] and bitmask [out_features, ceil(in_features / 8)].
        -0.0 is stored as 0.0.

    Raises:
        PatternError: if it is no such weight, in_features is no multiple of 4, or a group has more
            than two non-zeros.
    """
    if weight.dim() != 2 or weight.numel() == 0 or weight.dtype not in DTYPES:
        raise PatternError(
            f"{name} is {weight.dtype} {list(weight.shape)}, which is not a weight [out_features, "
            "in_features] in bf16, fp16, fp32 or int8"
        )
    out_features, in_features = weight.shape
    groups(weight, 4)
    if weight.is_meta:
        return (
            weight.new_empty(out_features, in_features // 2),
            weight.new_empty(out_features, -(-in_features // 8), dtype=torch.uint8),
        )
    check_weight(weight, TWO_FOUR, name)
    mask = hard_mask((weight != 0).to(torch.uint8))
    values = weight[mask].view(out_features, in_features // 2)
    values = torch.where(values == 0, torch.zeros_like(values), values)
    return values, pack_mask(mask)


def decompress(values: Tensor, bitmask: Tensor, in_features: int, name: str = "weight") -> Tensor:
    """The inverse of `compress`: the dense weight [out_features, in_features].

    Raises:
        PatternError: if the shapes do not belong together, or a group's bits are not exactly two.
    """
    out_features = values.shape[0] if values.dim() else 0
    expected = (out_features, in_features // 2), (out_features, -(-in_features // 8))
    if (
        (tuple(values.shape), tuple(bitmask.shape)) != expected
        or in_features % 4
        or not in_features
    ):
        raise PatternError(
            f"{name}: values {list(values.shape)} and bitmask {list(bitmask.shape)} do not belong "
            f"to [{out_features}, {in_features}]; {list(expected[0])} and {list(expected[1])} do"
        )
    dense = values.new_zeros(out_features, in_features)
    if values.is_meta:
        return dense
    mask = unpack_mask(bitmask, in_features, name)
    dense[mask] = values.reshape(-1)
    return dense


def pack_mask(mask: Tensor) -> Tensor:
    """bool [out_features, in_features] -> uint8 [out_features, ceil(in_features / 8)]."""
    bits = torch.nn.functional.pad(mask, (0, -mask.shape[-1] % 8)).unflatten(-1, (-1, 8))
    weights = 1 << torch.arange(8, dtype=torch.uint8, device=mask.device)
    return (bits * weights).sum(-1, dtype=torch.uint8)


def unpack_mask(bitmask: Tensor, in_features: int, name: str = "weight") -> Tensor:
    """The inverse of `pack_mask`.

    Raises:
        PatternError: if it is no bitmask of so many columns, or a group of four has not exactly two
            bits.
    """
    is_bytes = bitmask.dim() == 2 and bitmask.dtype == torch.uint8
    if not is_bytes or in_features <= 0 or bitmask.shape[1] != -(-in_features // 8):
        raise PatternError(
            f"{name}: {bitmask.dtype} {list(bitmask.shape)} is not a bitmask of {in_features} "
            f"columns: uint8 with {-(-in_features // 8)} bytes a row is"
        )
    shifts = torch.arange(8, dtype=torch.uint8, device=bitmask.device)
    bits = (bitmask.unsqueeze(-1) >> shifts) & 1
    mask = bits.flatten(-2)[..., :in_features].bool()
    num_bits = groups(mask, 4).sum(-1)
    bad = num_bits != 2
    if bad.any():
        row, group = bad.nonzero()[0].tolist()
        raise PatternError(
            f"{name}: {int(bad.sum())} groups of the bitmask have not exactly two bits; the first "
            f"is row {row}, group {group}, with {int(num_bits[row, group])}; the file is damaged "
            "or not 2:4: copy the directory again, or prune the model to 2:4 first"
        )
    return mask
