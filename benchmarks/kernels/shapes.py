"""The kernel benchmarks' options -> shapes of linears, token counts and N; and random weights."""

import torch
from torch import Tensor

from cast_serve.sparsity.bitmask import pack_mask
from cast_serve.sparsity.pattern import TWO_FOUR, Pattern, hard_mask

# (in_features, out_features) of the linears as vLLM merges them.
SHAPES = {
    "smollm2-135m": ((576, 960), (576, 576), (576, 3072), (1536, 576)),
    "llama-1b": ((2048, 3072), (2048, 2048), (2048, 16384), (8192, 2048)),
    "llama-8b": ((4096, 6144), (4096, 4096), (4096, 28672), (14336, 4096)),
}

# What the 2:4 op takes; the number after int4 is the scale group, 128 columns if there is none.
WEIGHTS = ("bf16", "int8", "int4", "int4-64", "int4-32")


def check_weights(weights: str, device: str) -> None:
    """Refuses weights that the op does not take on a device.

    Args:
        weights: as --weights has them.
        device: cpu or cuda.

    Raises:
        ValueError: naming the known ones.
    """
    known = WEIGHTS if device == "cpu" else WEIGHTS[:2]
    if weights not in known:
        raise ValueError(
            f"--weights {weights} is not known with --device {device}; choose one of "
            f"{', '.join(known)}"
        )


def scale_group_of(weights: str) -> int:
    """Columns that share a scale, of 4-bit weights; 0: one scale a row, or none."""
    name, _, group = weights.partition("-")
    return int(group or 128) if name == "int4" else 0


def shapes_of(name: str) -> tuple[tuple[int, int], ...]:
    """The linears of a model as vLLM merges them: (in_features, out_features) each.

    Raises:
        ValueError: naming the known ones.
    """
    if name not in SHAPES:
        raise ValueError(f"--shapes {name} is not known; choose one of {', '.join(SHAPES)}")
    return SHAPES[name]


def parse_tokens(text: str) -> list[int]:
    """Parses ``1,4,16``.

    Raises:
        ValueError: if it is not a list of whole numbers above 0.
    """
    parts = text.split(",")
    if not all(part.strip().isdigit() and int(part) > 0 for part in parts):
        raise ValueError(
            f"--tokens {text!r} is not a list of numbers above 0; write, for example, 1,8"
        )
    return [int(part) for part in parts]


def parse_sparsity(text: str, device: str) -> int | None:
    """Parses ``--sparsity``.

    Args:
        text: N:M.
        device: cpu or cuda.

    Returns:
        weights kept of 64; None: 2:4.

    Raises:
        ValueError: if it is not N:M with M dividing 64, or not 2:4 on a GPU.
    """
    pattern = Pattern.parse(text)
    if pattern == TWO_FOUR:
        return None
    if device != "cpu" or 64 % pattern.m:
        raise ValueError(
            f"--sparsity {text} is not known with --device {device}; a CPU takes N:M with M "
            "dividing 64, such as 32:64, and a GPU 2:4"
        )
    return pattern.n * 64 // pattern.m


def random_weight(
    in_features: int, out_features: int, weights: str = "bf16", kept: int | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """A random compressed weight, every pattern equally likely.

    Args:
        in_features: a multiple of the pattern's M.
        out_features: any.
        weights: one of WEIGHTS.
        kept: weights kept of 64; None: 2:4.

    Returns:
        values [out_features, number kept]: bf16, or int8 within ±127, for 4 bits within ±7;
        bitmask, uint8 [out_features, in_features / 8];
        scale: for int8 fp32 [out_features], 0.004 to 0.012 and exact in bf16; for 4 bits bf16
        [out_features, ceil(in_features / scale group)], 0.06 to 0.19; for bf16 None.
    """
    pattern = TWO_FOUR if kept is None else Pattern(kept, 64)
    bitmask = pack_mask(hard_mask(torch.rand(out_features, in_features), pattern))
    num_kept = (out_features, in_features // pattern.m * pattern.n)
    if weights == "bf16":
        return torch.randn(num_kept).bfloat16(), bitmask, None
    group = scale_group_of(weights)
    most = 7 if group else 127
    values = torch.randint(-most, most + 1, num_kept, dtype=torch.int8)
    if not group:
        return values, bitmask, (torch.rand(out_features) + 0.5).bfloat16().float() / 128
    scale = (torch.rand(out_features, -(-in_features // group)) + 0.5).bfloat16() / 8
    return values, bitmask, scale
