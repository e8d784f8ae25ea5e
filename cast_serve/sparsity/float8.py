"""float8 values and a scale a row -> weights in the model's dtype."""

import torch
from torch import Tensor

from cast_serve.sparsity.quantize import dequantize


def widen_float8(values: Tensor, scale: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """values * scale: multiplied in fp32, then rounded once to `dtype`; a stored -0.0 becomes 0.0.

    Args:
        values: float8 (e4m3) [out_features, columns].
        scale: [out_features, 1].
        dtype: bf16, fp16 or fp32.
        name: for error messages.

    Raises:
        ValueError: if a weight is NaN, or above the largest number of `dtype`.
    """
    wide = (dequantize(values, scale, torch.float32) + 0.0).to(dtype)
    is_bad = ~torch.isfinite(wide).all(1)
    if is_bad.any():
        row = int(is_bad.nonzero()[0])
        raise ValueError(
            f"{name}: row {row} of its float8 weights times their scale {float(scale[row])} holds "
            f"NaN, or more than {torch.finfo(dtype).max:.4g}, the most of {dtype}; "
            f"{int(is_bad.sum())} rows are wrong: copy the directory again, or use bf16"
        )
    return wide
