"""The int8 linears in Triton: activations and a packed int8 weight on a GPU -> the linear's output.

One kernel for 2:4 weights and for the dense head. Four columns of a row are one 32-bit word of four
int8 weights: the dense weight is stored so; a 2:4 group's two bytes are shifted to their columns,
which leaves zeros where the row dropped one. The word is spread over four neighbouring columns and
becomes x's dtype, exactly, since int8 fits into the 8 significant bits of bf16. One tensor-core
product per tile of 128 columns sums in fp32. The row's scale and the bias are applied at the end,
in fp32; where K is split over programs, by the kernel that adds the parts.

x is not quantised, other than on a CPU: the result differs from reference.linear24_int8 by the
rounding of x that is done there and not here. As in a dense product, NaN in x makes its token's
whole output NaN, and Inf makes it Inf or NaN. ``TRITON_INTERPRET=1`` runs all of this on a CPU.
"""

import triton
import triton.language as tl
from torch import Tensor

from cast_serve.kernels.gpu.launch import Launch

COLUMNS = tl.constexpr(128)  # of a tile
GROUPS = tl.constexpr(32)  # of a row of a tile
SPARSE_BYTES = tl.constexpr(640)  # of a tile: 8 rows x 64 values, then
POSITIONS_AT = tl.constexpr(512)  # 8 rows x 128 bits of positions
DENSE_BYTES = tl.constexpr(1024)  # 8 rows x 128 values
MAX_BLOCK_TOKENS = 128


def blocks_of(num_tokens: int) -> dict[str, int]:
    """Sizes of a program. Compiled, none spills on SM80 or SM90."""
    block_tokens = min(MAX_BLOCK_TOKENS, max(16, triton.next_power_of_2(num_tokens)))
    is_wide = block_tokens == MAX_BLOCK_TOKENS
    return {
        "BLOCK_TOKENS": block_tokens,
        "BLOCK_ROWS": 128 if is_wide else 64,
        "num_warps": 8 if is_wide else 4,
        "num_stages": 2 if is_wide else 3,  # three would take more shared memory than SM86 has
    }


@triton.jit
def _linear_int8_kernel(
    x,  # [num_tokens, in_features]
    tiles,  # uint8: the packed weight
    scale,  # fp32 [out_features]
    bias,
    out,  # [num_tokens, out_features], or fp32 [splits, num_tokens, out_features]
    num_tokens,
    out_features,
    in_features,
    tile_columns,
    x_stride,
    tiles_per_split,
    DOT_DTYPE: tl.constexpr,
    IS_SPARSE: tl.constexpr,
    IS_SPLIT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    TILE_BYTES: tl.constexpr = SPARSE_BYTES if IS_SPARSE else DENSE_BYTES
    rows = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    tokens = tl.program_id(1) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    split = tl.program_id(2)
    is_row, is_token = rows < out_features, tokens < num_tokens
    columns, groups = tl.arange(0, COLUMNS), tl.arange(0, GROUPS)
    tile_row_at = tiles + (rows // 8).to(tl.int64) * tile_columns * TILE_BYTES
    x_at = x + tokens.to(tl.int64) * x_stride
    first = split * tiles_per_split
    last = tl.minimum(first + tiles_per_split, tile_columns)

    total = tl.zeros((BLOCK_ROWS, BLOCK_TOKENS), tl.float32)
    for tile in range(first, last):
        at = tile * COLUMNS + columns
        activations = tl.load(
            x_at[:, None] + at[None, :],
            mask=is_token[:, None] & (at < in_features)[None, :],
            other=0,
        )
        tile_at = tile_row_at + tile * TILE_BYTES
        if IS_SPARSE:
            word = _sparse_words(tile_at, rows, is_row, groups, BLOCK_ROWS)
        else:
            words = (tile_at + rows % 8 * COLUMNS).to(tl.pointer_type(tl.int32))
            word = tl.load(words[:, None] + groups[None, :], mask=is_row[:, None], other=0)
        # Each byte of a word at the top of a word of its own; joined, they are in order.
        even, odd = tl.join(word << 24, word << 8), tl.join(word << 16, word)
        weight = tl.reshape(tl.join(even, odd), (BLOCK_ROWS, COLUMNS)) >> 24
        weight = weight.to(tl.float32).to(DOT_DTYPE)
        total = tl.dot(weight, tl.trans(activations.to(DOT_DTYPE)), total)
    if not IS_SPLIT:
        total *= tl.load(scale + rows, mask=is_row, other=0)[:, None]
        if HAS_BIAS:
            total += tl.load(bias + rows, mask=is_row, other=0).to(tl.float32)[:, None]
    at = (split * num_tokens + tokens).to(tl.int64)[None, :] * out_features + rows[:, None]
    mask = is_row[:, None] & is_token[None, :]
    tl.store(out + at, total.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _sparse_words(tile_at, rows, is_row, groups, BLOCK_ROWS: tl.constexpr):
    """The rows' groups of one 2:4 tile as words of four int8 weights [BLOCK_ROWS, GROUPS]."""
    pairs = (tile_at + rows % 8 * (2 * GROUPS)).to(tl.pointer_type(tl.int16))
    pair = tl.load(pairs[:, None] + groups[None, :], mask=is_row[:, None], other=0).to(tl.int32)
    halves = (tile_at + rows % 8 * 16 + POSITIONS_AT).to(tl.pointer_type(tl.int64))
    half = tl.load(halves[:, None] + tl.arange(0, 2)[None, :], mask=is_row[:, None], other=0)
    in_half = tl.arange(0, GROUPS // 2)
    low = (half[:, :, None] >> (in_half * 4)[None, None, :]).to(tl.int32)
    low = tl.reshape(low, (BLOCK_ROWS, GROUPS))
    return (pair & 0xFF) << ((low & 3) * 8) | (pair >> 8 & 0xFF) << ((low >> 2 & 3) * 8)


def linear_int8(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    out_features: int,
    bias: Tensor | None,
    is_sparse: bool,
    num_processors: int,
) -> Tensor:
    """x @ (weight * scale).T + bias with fp32 accumulation; shapes are checked by the caller.

    Args:
        x: [num_tokens, in_features], bf16 or fp16.
        packed: uint8 [tile_rows, tile_columns, 640], see reference.pack; if not `is_sparse`
            [tile_rows, tile_columns, 1024], see reference.pack_dense.
        scale: fp32 [out_features].
        out_features: rows of the weight.
        bias: [out_features] or None.
        is_sparse: whether the weight is 2:4.
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
    launch = Launch.plan(x, out, bias, tile_columns, blocks, num_processors)
    _linear_int8_kernel[launch.grid](
        x,
        packed,
        scale,
        scale if bias is None else launch.bias,
        launch.sums,
        num_tokens,
        out_features,
        in_features,
        tile_columns,
        x.stride(0),
        launch.steps_per_split,
        DOT_DTYPE=launch.dot_dtype,
        IS_SPARSE=is_sparse,
        IS_SPLIT=launch.is_split,
        HAS_BIAS=bias is not None,
        **blocks,
    )
    return launch.finish(scale)
