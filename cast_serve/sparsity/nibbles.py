"""4-bit integers <-> int32 words of eight, as compressed-tensors packs them.

Column 8j + i of a row is in bits 4i to 4i + 3 of word j, as the integer plus 8. The last word's
unused bits are 0, and ignored on reading.
"""

import torch
from torch import Tensor

PACKED = "weight_packed"  # what a linear's words are called on disk
NIBBLES = 8  # of a word
OFFSET = 8


def pack_nibbles(values: Tensor) -> Tensor:
    """int8 [rows, columns], -8 to 7 -> int32 [rows, ceil(columns / 8)]."""
    unsigned = values.to(torch.int32) + OFFSET
    words = torch.nn.functional.pad(unsigned, (0, -values.shape[1] % NIBBLES))
    return (words.unflatten(1, (-1, NIBBLES)) << _shifts(values)).sum(-1, dtype=torch.int32)


def unpack_nibbles(packed: Tensor, columns: int) -> Tensor:
    """The inverse of `pack_nibbles`: int8 [rows, columns], contiguous."""
    unsigned = (packed.unsqueeze(-1) >> _shifts(packed)) & 0b1111
    return (unsigned.to(torch.int8) - OFFSET).flatten(1)[:, :columns].contiguous()


def _shifts(like: Tensor) -> Tensor:
    return torch.arange(0, 32, 4, dtype=torch.int32, device=like.device)
