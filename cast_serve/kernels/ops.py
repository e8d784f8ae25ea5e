"""The op ``torch.ops.cast.linear24``: the compiled CPU kernels, the GPU's, and its fake."""

import torch
from torch import Tensor

from cast_serve.kernels.gpu import dispatch
from cast_serve.kernels.reference import packed_shape


def load() -> None:
    """Registers the op, its fake and its GPU kernels once per process; compiles it if necessary.

    Raises:
        KernelBuildError: if it is not compiled yet and cannot be.
    """
    if hasattr(torch.ops.cast, "cpu_isas"):
        return
    from cast_serve.kernels.cpu import build  # here, so that `python -m` can run build.py too

    build.load()
    torch.library.register_fake("cast::linear24")(_linear24_fake)
    if torch.cuda.is_available():
        dispatch.register()


def _linear24_fake(
    x: Tensor, packed: Tensor, out_features: int, bias: Tensor | None = None
) -> Tensor:
    expected = packed_shape(out_features, x.shape[-1], x.dtype)
    torch._check(
        tuple(packed.shape) == expected, lambda: f"packed {packed.shape} is not {expected}"
    )
    return x.new_empty(*x.shape[:-1], out_features)
