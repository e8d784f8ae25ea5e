"""4-bit integers <-> int32 words of eight, as compressed-tensors packs them.

Column 8j + i of a row is in bits 4i to 4i + 3 of word j, as the integer plus 8. The last word's
unused bits are 0, and ignored on reading. Bytes are worked on, not words, since an output head is
large: the lower half of each comes first.
"""

import torch
from torch import Tensor

PACKED = "weight_packed"  # what a linear's words are called on disk
NIBBLES = 8  # of a word
OFFSET = 8


def pack_nibbles(values: Tensor) -> Tensor:
    """int8 [rows, columns], -8 to 7 -> int32 [rows, ceil(columns / 8)]."""
    unsigned = (values + OFFSET).view(torch.uint8)
    pairs = torch.nn.functional.pad(unsigned, (0, -values.shape[1] % NIBBLES)).unflatten(1, (-1, 2))
    return (pairs[..., 0] | pairs[..., 1] << 4).contiguous().view(torch.int32)


def unpack_nibbles(packed: Tensor, columns: int) -> Tensor:
    """The inverse of `pack_nibbles`: int8 [rows, columns], contiguous."""
    octets = packed.contiguous().view(torch.uint8)
    unsigned = torch.stack((octets & 0b1111, octets >> 4), dim=-1).flatten(1)
    return (unsigned.view(torch.int8) - OFFSET)[:, :columns].contiguous()
