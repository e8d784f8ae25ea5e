"""A model's name -> the linears that the kernel benchmarks time; token counts, random weights."""

import torch
from torch import Tensor

# (in_features, out_features) of the linears as vLLM merges them.
SHAPES = {
    "smollm2-135m": ((576, 960), (576, 576), (576, 3072), (1536, 576)),
    "llama-1b": ((2048, 3072), (2048, 2048), (2048, 16384), (8192, 2048)),
    "llama-8b": ((4096, 6144), (4096, 4096), (4096, 28672), (14336, 4096)),
}

# Of the 2:4 op; int4 with scale groups of 128 columns.
WEIGHTS = ("bf16", "int8", "int4", "int4-64", "int4-32")


def check_weights(weights: str, device: str) -> None:
    """Raises ValueError, naming the known ones, if the op has no such weights on cpu or cuda."""
    known = WEIGHTS if device == "cpu" else WEIGHTS[:2]
    if weights not in known:
        raise ValueError(
            f"--weights {weights} is not known with --device {device}; choose one of "
            f"{', '.join(known)}"
        )


def scale_group_of(weights: str) -> int:
    """Columns that share a scale, of 4-bit weights; 0 of others."""
    name, _, group = weights.partition("-")
    return int(group or 128) if name == "int4" else 0


def shapes_of(name: str) -> tuple[tuple[int, int], ...]:
    """The merged linears of a model.

    Raises:
        ValueError: naming the known ones.
    """
    if name not in SHAPES:
        raise ValueError(f"--shapes {name} is not known; choose one of {', '.join(SHAPES)}")
    return SHAPES[name]


def parse_tokens(text: str) -> list[int]:
    """Parses ``1,4,16``.

    Raises:
        ValueError: if it is no list of whole numbers above 0.
    """
    parts = text.split(",")
    if not all(part.strip().isdigit() and int(part) > 0 for part in parts):
        raise ValueError(f"--tokens {text!r} is no list of numbers above 0; write for instance 1,8")
    return [int(part) for part in parts]


def random_weight(in_features: int, out_features: int) -> tuple[Tensor, Tensor]:
    """A random compressed 2:4 weight, every pattern of a group equally likely.

    Returns:
        values, bf16 [out_features, in_features / 2], and bitmask, uint8 [.., in_features / 8].
    """
    values = torch.randn(out_features, in_features // 2).bfloat16()
    return values, _random_bitmask(in_features, out_features)


def random_int8_weight(in_features: int, out_features: int) -> tuple[Tensor, Tensor, Tensor]:
    """As `random_weight`, quantised.

    Returns:
        values, int8 [out_features, in_features / 2] within +-127, bitmask as there, and scale,
        fp32 [out_features], 0.004 to 0.012, exact in bf16.
    """
    values = torch.randint(-127, 128, (out_features, in_features // 2), dtype=torch.int8)
    scale = (torch.rand(out_features) + 0.5).bfloat16().float() / 128
    return values, _random_bitmask(in_features, out_features), scale


def random_int4_weight(
    in_features: int, out_features: int, group: int
) -> tuple[Tensor, Tensor, Tensor]:
    """As `random_weight`, quantised to 4 bits.

    Returns:
        values, int8 [out_features, in_features / 2] within +-7, bitmask as there, and scale, bf16
        [out_features, ceil(in_features / group)], 0.06 to 0.19.
    """
    values = torch.randint(-7, 8, (out_features, in_features // 2), dtype=torch.int8)
    scale = (torch.rand(out_features, -(-in_features // group)) + 0.5).bfloat16() / 8
    return values, _random_bitmask(in_features, out_features), scale


def _random_bitmask(in_features: int, out_features: int) -> Tensor:
    patterns = torch.tensor([0b0011, 0b0101, 0b1001, 0b0110, 0b1010, 0b1100], dtype=torch.uint8)
    nibbles = patterns[torch.randint(6, (out_features, in_features // 4))]
    return nibbles[:, 0::2] | nibbles[:, 1::2] << 4
