"""The 4-bit linear in Triton: activations and a packed 4-bit weight on a GPU -> its output.

As triton_int8.py, whose words of four weights it makes of a group's byte or two: the two values
come to the upper four bits of a byte each, which is 16 times the weight. One tensor-core product
per scale group sums in fp32, and is multiplied with the rows' scales / 16 before the next is added.

x is not quantised, other than on a CPU: the result differs from reference_int4.linear24_int4 by the
rounding of x that is done there and not here.
"""

import triton
import triton.language as tl
from torch import Tensor

from cast_serve.kernels.gpu.launch import Launch
from cast_serve.kernels.gpu.triton_int8 import blocks_of
from cast_serve.kernels.reference import INT8_TILE_COLUMNS

POSITIONS_AT = tl.constexpr(256)  # of a tile: 8 rows x 32 bytes of values, then
SCALES_AT = tl.constexpr(384)  # 8 rows x 128 bits of positions, then scales in bf16


@triton.jit
def _linear24_int4_kernel(
    x,  # [num_tokens, in_features]
    tiles,  # uint8: the packed weight
    bias,
    out,  # [num_tokens, out_features], or fp32 [splits, num_tokens, out_features]
    num_tokens,
    out_features,
    in_features,
    tile_columns,
    x_stride,
    groups_per_split,
    DOT_DTYPE: tl.constexpr,
    GROUP: tl.constexpr,
    TILE_GROUPS: tl.constexpr,
    TILE_BYTES: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    tokens = tl.program_id(1) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    split = tl.program_id(2)
    is_row, is_token = rows < out_features, tokens < num_tokens
    columns, fours = tl.arange(0, GROUP), tl.arange(0, GROUP // 4)
    tile_row_at = tiles + (rows // 8).to(tl.int64) * tile_columns * TILE_BYTES
    x_at = x + tokens.to(tl.int64) * x_stride
    first = split * groups_per_split
    last = tl.minimum(first + groups_per_split, tile_columns * TILE_GROUPS)

    total = tl.zeros((BLOCK_ROWS, BLOCK_TOKENS), tl.float32)
    for group in range(first, last):
        at = group * GROUP + columns
        activations = tl.load(
            x_at[:, None] + at[None, :],
            mask=is_token[:, None] & (at < in_features)[None, :],
            other=0,
        )
        tile_at = tile_row_at + group // TILE_GROUPS * TILE_BYTES
        # The groups of four columns, numbered in the tile; where a tile keeps them: reference_int4.
        four = group % TILE_GROUPS * (GROUP // 4) + fours
        pair_at = four // 2 % 2 * 8 + four // 8 * 2 + four % 2
        pairs = (tile_at + rows % 8 * 32).to(tl.pointer_type(tl.int16))
        pair = tl.load(pairs[:, None] + pair_at[None, :], mask=is_row[:, None], other=0)
        pair = pair.to(tl.int32) << (4 - four // 4 % 2 * 4)[None, :]
        both_at = (tile_at + rows % 8 * 16 + POSITIONS_AT)[:, None] + (four // 2)[None, :]
        both = tl.load(both_at, mask=is_row[:, None], other=0).to(tl.int32)
        low = both >> (four % 2 * 4)[None, :]
        word = (pair & 0xF0) << ((low & 3) * 8) | (pair >> 8 & 0xF0) << ((low >> 2 & 3) * 8)
        # Each byte of a word at the top of a word of its own; joined, they are in order.
        even, odd = tl.join(word << 24, word << 8), tl.join(word << 16, word)
        weight = tl.reshape(tl.join(even, odd), (BLOCK_ROWS, GROUP)) >> 24
        weight = weight.to(tl.float32).to(DOT_DTYPE)
        scales = (tile_at + SCALES_AT).to(tl.pointer_type(tl.int16))
        number = rows % 8 * TILE_GROUPS + group % TILE_GROUPS
        # A bf16 number is the upper half of an fp32 one.
        bits = tl.load(scales + number, mask=is_row, other=0).to(tl.int32) << 16
        scale = bits.to(tl.float32, bitcast=True) / 16
        total += tl.dot(weight, tl.trans(activations.to(DOT_DTYPE))) * scale[:, None]
    if HAS_BIAS:
        total += tl.load(bias + rows, mask=is_row, other=0).to(tl.float32)[:, None]
    at = (split * num_tokens + tokens).to(tl.int64)[None, :] * out_features + rows[:, None]
    mask = is_row[:, None] & is_token[None, :]
    tl.store(out + at, total.to(out.dtype.element_ty), mask=mask)


def linear24_int4(
    x: Tensor,
    packed: Tensor,
    group: int,
    out_features: int,
    bias: Tensor | None,
    num_processors: int,
) -> Tensor:
    """x @ (weight * scale).T + bias with fp32 accumulation; shapes are checked by the caller.

    Args:
        x: [num_tokens, in_features], bf16 or fp16.
        packed: uint8 [tile_rows, tile_columns, tile_bytes], see reference_int4.pack_int4.
        group: columns that share a scale, 128, 64 or 32.
        out_features: rows of the weight.
        bias: [out_features] or None.
        num_processors: of the GPU; decides over how many programs K is split.

    Returns:
        [num_tokens, out_features] in x's dtype.
    """
    num_tokens, in_features = x.shape
    out = x.new_empty(num_tokens, out_features)
    if not out.numel():
        return out
    if x.stride(1) != 1:
        x = x.contiguous()
    tile_columns, blocks = packed.shape[1], blocks_of(num_tokens)
    tile_groups = INT8_TILE_COLUMNS // group
    launch = Launch.plan(x, out, bias, tile_columns * tile_groups, blocks, num_processors)
    _linear24_int4_kernel[launch.grid](
        x,
        packed,
        packed if bias is None else launch.bias,
        launch.sums,
        num_tokens,
        out_features,
        in_features,
        tile_columns,
        x.stride(0),
        launch.steps_per_split,
        DOT_DTYPE=launch.dot_dtype,
        GROUP=group,
        TILE_GROUPS=tile_groups,
        TILE_BYTES=packed.shape[2],
        HAS_BIAS=bias is not None and not launch.is_split,
        **blocks,
    )
    return launch.finish()
