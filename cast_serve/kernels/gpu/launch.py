"""x and a packed weight -> what a Triton kernel is launched with: grid, output, and parts along K.

Where there are few rows, K is split over programs and `add_up` adds the parts, in a fixed order.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

PROGRAMS_PER_PROCESSOR = 4  # enough loads in flight to fill the memory bus


@dataclass(frozen=True)
class Launch:
    """One launch over blocks of rows and tokens, and over parts of K.

    Attributes:
        out: [num_tokens, out_features] in x's dtype.
        sums: what the kernel writes: `out`, or where K is split fp32
            [num_splits, num_tokens, out_features].
        grid: programs over rows, tokens and parts of K.
        steps_per_split: steps along K of a program.
        bias: [out_features], contiguous, or None.
        dtype: x's, as Triton names it.
        dot_dtype: what is multiplied: x's, but fp32 in Triton's interpreter, which would multiply
            bf16 as integers.
    """

    out: Tensor
    sums: Tensor
    grid: tuple[int, int, int]
    steps_per_split: int
    bias: Tensor | None
    dtype: tl.dtype
    dot_dtype: tl.dtype

    @classmethod
    def plan(
        cls,
        x: Tensor,
        out: Tensor,
        bias: Tensor | None,
        num_steps: int,
        blocks: dict[str, int],
        num_processors: int,
    ) -> "Launch":
        """Plans a launch.

        Args:
            x: [num_tokens, in_features], bf16 or fp16.
            out: [num_tokens, out_features] in x's dtype.
            bias: [out_features] or None.
            num_steps: along K.
            blocks: of a program: BLOCK_ROWS, BLOCK_TOKENS and others.
            num_processors: of the GPU; decides over how many programs K is split.
        """
        num_tokens, out_features = out.shape
        rows = triton.cdiv(out_features, blocks["BLOCK_ROWS"])
        tokens = triton.cdiv(num_tokens, blocks["BLOCK_TOKENS"])
        steps, num_splits = splits_of(num_steps, rows * tokens, num_processors)
        is_split = num_splits > 1
        sums = x.new_empty(num_splits, *out.shape, dtype=torch.float32) if is_split else out
        dtype = tl.bfloat16 if x.dtype == torch.bfloat16 else tl.float16
        return cls(
            out,
            sums,
            (rows, tokens, num_splits),
            steps,
            bias if bias is None else bias.contiguous(),
            dtype,
            tl.float32 if triton.knobs.runtime.interpret else dtype,
        )

    @property
    def is_split(self) -> bool:
        return self.grid[2] > 1

    def finish(self, scale: Tensor | None = None) -> Tensor:
        """`out`; where K is split, the sum of its parts * scale, fp32 [out_features], + bias."""
        if self.is_split:
            add_up(self.sums, self.out, self.bias, scale)
        return self.out


@triton.jit
def _add_up_kernel(
    parts,
    scale,
    bias,
    out,
    num_splits,
    numel,
    out_features,
    HAS_SCALE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < numel
    total = tl.zeros((BLOCK,), tl.float32)
    part = parts + at
    for _ in range(num_splits):
        total += tl.load(part, mask=mask, other=0)
        part += numel
    if HAS_SCALE:
        total *= tl.load(scale + at % out_features, mask=mask, other=0)
    if HAS_BIAS:
        total += tl.load(bias + at % out_features, mask=mask, other=0).to(tl.float32)
    tl.store(out + at, total.to(out.dtype.element_ty), mask=mask)


def splits_of(num_steps: int, num_programs: int, num_processors: int) -> tuple[int, int]:
    """Over how many programs the steps along K are split: (steps of each, programs)."""
    wanted = triton.cdiv(PROGRAMS_PER_PROCESSOR * num_processors, num_programs)
    steps = triton.cdiv(num_steps, min(num_steps, wanted))
    return steps, triton.cdiv(num_steps, steps)


def add_up(parts: Tensor, out: Tensor, bias: Tensor | None, scale: Tensor | None = None) -> None:
    """Writes scale * the sum of the parts + bias, in fp32, into `out`.

    Args:
        parts: fp32 [num_splits, num_tokens, out_features].
        out: [num_tokens, out_features], contiguous.
        bias: [out_features] or None.
        scale: fp32 [out_features] or None.
    """
    block = 1024
    _add_up_kernel[(triton.cdiv(out.numel(), block),)](
        parts,
        parts if scale is None else scale,
        parts if bias is None else bias,
        out,
        parts.shape[0],
        out.numel(),
        out.shape[1],
        HAS_SCALE=scale is not None,
        HAS_BIAS=bias is not None,
        BLOCK=block,
    )
