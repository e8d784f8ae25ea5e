"""int32 words of packed integers -> int8; and what a linear of them is, whatever its format."""

from typing import NamedTuple

import torch
from torch import Tensor

from cast_serve.checkpoint.record import CheckpointError

SCALE_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
REMEDY = "start from the unquantised checkpoint"


class Integers(NamedTuple):
    """A 2:4 weight [out_features, in_features].

    Attributes:
        values: int8 [out_features, in_features / 2], of 4 or 8 bits.
        bitmask: uint8 [out_features, ceil(in_features / 8)].
        scale: [out_features, number of scale groups], each of as many columns.
        num_bits: 4 or 8.
    """

    values: Tensor
    bitmask: Tensor
    scale: Tensor
    num_bits: int


def unpack(packed: Tensor, num_bits: int) -> Tensor:
    """int32 [rows, words] -> int8 [rows, words * 32 / num_bits].

    The lowest bits come first; each integer is stored plus 2^(num_bits - 1).
    """
    octets = packed.contiguous().view(torch.uint8)
    if num_bits == 4:
        octets = torch.stack((octets & 15, octets >> 4), dim=-1).flatten(1)
    return (octets - (1 << num_bits - 1)).view(torch.int8)  # modulo 256


def check_scales(tensor: str, scale: Tensor) -> None:
    """Refuses scales [out_features, number of scale groups] that are not finite and positive.

    Raises:
        CheckpointError: naming the tensor, and the first.
    """
    is_bad = ~(torch.isfinite(scale) & (scale > 0))
    if is_bad.any():
        row, group = is_bad.nonzero()[0].tolist()
        raise CheckpointError(
            f"{tensor}: scale {group} of row {row} is {float(scale[row, group])}, but a scale is "
            f"finite and above 0; {int(is_bad.sum())} are wrong and the file is damaged: "
            "copy the directory again"
        )
