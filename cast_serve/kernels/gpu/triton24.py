"""The 2:4 linear in Triton: activations and a packed weight on a GPU -> the linear's output.

One kernel for any number of tokens. It reads the packed weight as it is (reference.py), 0.5625 of
the dense bytes, and expands it in registers: column c of every group of four is one matrix, zero
where a row dropped it, and the linear is the sum of four tensor-core products, one per column.
Where there are few rows, K is split over programs and a second kernel adds the parts, in a fixed
order.

The zeros are multiplied: where an activation is Inf or NaN, every row becomes NaN, as in a dense
product and unlike the CPU kernels. ``TRITON_INTERPRET=1`` runs all of this on a CPU, in numpy.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from cast_serve.kernels.gpu.launch import Launch

TILE_WORDS = tl.constexpr(144)  # int32 of a tile: 8 rows x 16 groups of two values, then
POSITIONS_AT = tl.constexpr(128)  # 8 rows x 64 bits of positions
GROUPS = tl.constexpr(16)  # of a row of a tile
MAX_BLOCK_TOKENS = 128
NUM_STAGES = 3


def blocks_of(num_tokens: int) -> dict[str, int]:
    """Sizes of a program. Compiled, they spill at most 8 bytes on SM80 and nothing on SM90."""
    block_tokens = min(MAX_BLOCK_TOKENS, max(16, triton.next_power_of_2(num_tokens)))
    is_wide = block_tokens == MAX_BLOCK_TOKENS
    return {
        "BLOCK_TOKENS": block_tokens,
        "BLOCK_ROWS": 128 if is_wide else 64,
        "BLOCK_TILES": 1 if is_wide else 2,  # tile columns a step, 64 columns each
        "num_warps": 8 if is_wide else 4,
        "num_stages": NUM_STAGES,
    }


@triton.jit
def _linear24_kernel(
    quads,  # int64 [num_tokens, in_features / 4]: four activations each
    words,  # int32: the packed weight
    bias,
    out,  # [num_tokens, out_features], or fp32 [splits, num_tokens, out_features]
    num_tokens,
    out_features,
    num_groups,
    tile_columns,
    quads_stride,
    tiles_per_split,
    DTYPE: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_TILES: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    tokens = tl.program_id(1) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    split = tl.program_id(2)
    is_row, is_token = rows < out_features, tokens < num_tokens
    tile_row_at = (rows // 8).to(tl.int64) * tile_columns * TILE_WORDS
    pair_at = words + (tile_row_at + rows % 8 * GROUPS)
    bits_at = words + (tile_row_at + rows % 8 * 2 + POSITIONS_AT)
    quad_at = quads + tokens.to(tl.int64) * quads_stride
    in_tile = tl.arange(0, GROUPS)
    lanes = tl.arange(0, GROUPS * BLOCK_TILES)
    first = split * tiles_per_split
    last = tl.minimum(first + tiles_per_split, tile_columns)

    total = tl.zeros((BLOCK_ROWS, BLOCK_TOKENS), tl.float32)
    for start in range(first, last, BLOCK_TILES):
        tiles = start + tl.arange(0, BLOCK_TILES)
        is_tile = is_row[:, None] & (tiles < last)[None, :]
        tile_at = bits_at[:, None] + (tiles * TILE_WORDS)[None, :]
        bits = tl.load(tile_at.to(tl.pointer_type(tl.int64)), mask=is_tile, other=0)
        at = pair_at[:, None, None] + (tiles * TILE_WORDS)[None, :, None] + in_tile[None, None, :]
        pair = tl.load(at, mask=is_tile[:, :, None], other=0)
        groups = start * GROUPS + lanes
        quad = tl.load(
            quad_at[:, None] + groups[None, :],
            mask=is_token[:, None] & (groups < num_groups)[None, :],
            other=0,
        )
        # A group's two values, each moved to its column, are the group's four dense weights.
        low = (bits[:, :, None] >> (in_tile * 4)[None, None, :]).to(tl.int32)
        kept = (pair & 0xFFFF).to(tl.int64) << ((low & 3) * 16).to(tl.int64)
        kept |= ((pair >> 16) & 0xFFFF).to(tl.int64) << ((low >> 2 & 3) * 16).to(tl.int64)
        dense = tl.reshape(kept, (BLOCK_ROWS, GROUPS * BLOCK_TILES))
        for column in tl.static_range(4):
            weight = (dense >> (16 * column)).to(tl.int16).to(DTYPE, bitcast=True).to(DOT_DTYPE)
            x = (quad >> (16 * column)).to(tl.int16).to(DTYPE, bitcast=True).to(DOT_DTYPE)
            total = tl.dot(weight, tl.trans(x), total)
    if HAS_BIAS:
        total += tl.load(bias + rows, mask=is_row, other=0).to(tl.float32)[:, None]
    at = (split * num_tokens + tokens).to(tl.int64)[None, :] * out_features + rows[:, None]
    mask = is_row[:, None] & is_token[None, :]
    tl.store(out + at, total.to(out.dtype.element_ty), mask=mask)


def linear24(
    x: Tensor, packed: Tensor, out_features: int, bias: Tensor | None, num_processors: int
) -> Tensor:
    """x @ weight.T + bias with fp32 accumulation; shapes are checked by the caller.

    Args:
        x: [num_tokens, in_features], bf16 or fp16.
        packed: uint8 [tile_rows, tile_columns, 576], see reference.pack.
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
    if x.stride(1) != 1 or x.stride(0) % 4 or x.data_ptr() % 8:
        x = x.clone(memory_format=torch.contiguous_format)
    tile_columns, blocks = packed.shape[1], blocks_of(num_tokens)
    steps = triton.cdiv(tile_columns, blocks["BLOCK_TILES"])
    launch = Launch.plan(x, out, bias, steps, blocks, num_processors)
    _linear24_kernel[launch.grid](
        x.view(torch.int64),
        packed.view(torch.int32),
        x if bias is None else launch.bias,
        launch.sums,
        num_tokens,
        out_features,
        in_features // 4,
        tile_columns,
        x.stride(0) // 4,
        launch.steps_per_split * blocks["BLOCK_TILES"],
        DTYPE=launch.dtype,
        DOT_DTYPE=launch.dot_dtype,
        HAS_BIAS=bias is not None and not launch.is_split,
        **blocks,
    )
    return launch.finish()
