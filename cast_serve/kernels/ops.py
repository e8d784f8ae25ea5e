"""The ops of ``torch.ops.cast``: linear24, linear24_int8, linear24_int4, linear_int8, linear64."""

import torch
from torch import Tensor

from cast_serve.kernels.gpu import dispatch
from cast_serve.kernels.reference import packed_dense_shape, packed_shape
from cast_serve.kernels.reference64 import packed_shape64
from cast_serve.kernels.reference_int4 import int4_packed_shape


def load(tune: bool = False) -> None:
    """Registers the ops, fakes and GPU kernels once per process; compiles them if necessary.

    Args:
        tune: also choose the CPU kernels' settings as ``CAST_CPU_TUNING`` says; that may measure
            for a few seconds (cpu/tuning.py).

    Raises:
        KernelBuildError: if they are not compiled yet and cannot be.
        ValueError: with `tune`, if ``CAST_CPU_TUNING`` has no such value.
    """
    # Here, so that `python -m` can run build.py too.
    from cast_serve.kernels.cpu import build, tuning

    if not hasattr(torch.ops.cast, "cpu_isas"):
        build.load()
        _register()
    if tune:
        tuning.tune()


def _register() -> None:
    torch.library.register_fake("cast::linear24")(_linear24_fake)
    torch.library.register_fake("cast::linear24_int8")(_linear24_int8_fake)
    torch.library.register_fake("cast::linear24_int4")(_linear24_int4_fake)
    torch.library.register_fake("cast::linear_int8")(_linear_int8_fake)
    torch.library.register_fake("cast::linear64")(_linear64_fake)
    if torch.cuda.is_available():
        dispatch.register()


def _linear24_fake(
    x: Tensor, packed: Tensor, out_features: int, bias: Tensor | None = None
) -> Tensor:
    return _fake(x, packed, out_features, packed_shape(out_features, x.shape[-1], x.dtype))


def _linear24_int8_fake(
    x: Tensor, packed: Tensor, scale: Tensor, out_features: int, bias: Tensor | None = None
) -> Tensor:
    return _fake(x, packed, out_features, packed_shape(out_features, x.shape[-1], torch.int8))


def _linear24_int4_fake(
    x: Tensor, packed: Tensor, group: int, out_features: int, bias: Tensor | None = None
) -> Tensor:
    return _fake(x, packed, out_features, int4_packed_shape(out_features, x.shape[-1], group))


def _linear_int8_fake(
    x: Tensor, packed: Tensor, scale: Tensor, out_features: int, bias: Tensor | None = None
) -> Tensor:
    return _fake(x, packed, out_features, packed_dense_shape(out_features, x.shape[-1]))


def _linear64_fake(
    x: Tensor,
    packed: Tensor,
    kept: int,
    out_features: int,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    scale_group: int = 0,
) -> Tensor:
    dtype = torch.int8 if scale is not None or scale_group else x.dtype
    shape = packed_shape64(out_features, x.shape[-1], kept, dtype, scale_group or None)
    return _fake(x, packed, out_features, shape)


def _fake(x: Tensor, packed: Tensor, out_features: int, expected: tuple[int, int, int]) -> Tensor:
    torch._check(
        tuple(packed.shape) == expected, lambda: f"packed {packed.shape} is not {expected}"
    )
    return x.new_empty(*x.shape[:-1], out_features)
