"""The ops on a GPU: the Triton kernels, and for many tokens a second form if asked for.

The Triton kernels work for any number of tokens. From some number on a product on 2:4 tensor cores,
or a dense one, may be faster, but it needs the weight a second time in another layout.
``CAST_CUDA_MANY_TOKENS`` says which is kept beside a packed weight of 16 bits (bytes as a share of
dense):

    packed       none, 0.5625 (the default)
    cusparselt   cuSPARSELt's, 1.125 in all
    cutlass      torch's for CUTLASS, 1.125 in all; compute capability 8.x only
    dense        the dense weight, 1.5625 in all

crossover.json says from how many tokens on it is used, card by card, as benchmarks/kernels/gpu.py
measured it; any other card gets `UNMEASURED_TOKENS`, and one warning.
"""

import functools
import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cast_serve.kernels.reference import packed_dense_shape, packed_shape, unpack
from cast_serve.kernels.reference_int4 import int4_packed_shape
from cast_serve.sparsity.bitmask import decompress

logger = logging.getLogger(__name__)

FORMS = ("packed", "cusparselt", "cutlass", "dense")
# Both sizes of a weight must be whole multiples: (out_features, in_features).
MULTIPLES = {"cusparselt": (16, 16), "cutlass": (32, 64), "dense": (1, 1)}
CROSSOVER = Path(__file__).parent / "crossover.json"
# Reading the packed weight takes as long as multiplying on dense tensor cores at 88 tokens with
# 2 TB/s and 312 TFLOP/s, at 166 with 3.35 TB/s and 990: from there on a second form may pay.
UNMEASURED_TOKENS = 128
PADDED_TOKENS = 16  # the 2:4 products take whole multiples of it
INTERPRETED_PROCESSORS = 4
PACKED_ALIGNMENT = 16  # bytes: what the kernels read at once

_registered: list[torch.library.Library] = []  # kept, since a collected library is unregistered


def register() -> None:
    """Gives the ops their CUDA kernels and defines ``cast::linear24_many``, once."""
    if _registered:
        return
    library = torch.library.Library("cast", "FRAGMENT")
    _registered.append(library)
    library.impl("linear24", linear24, "CUDA")
    library.impl("linear24_int8", linear24_int8, "CUDA")
    library.impl("linear24_int4", linear24_int4, "CUDA")
    library.impl("linear_int8", linear_int8, "CUDA")
    library.define(
        "linear24_many(Tensor x, Tensor packed, int out_features, Tensor? bias, Tensor[] second, "
        "str form) -> Tensor"
    )
    library.impl("linear24_many", linear24_many, "CUDA")
    torch.library.register_fake("cast::linear24_many", _many_fake, lib=library)


def linear24(x: Tensor, packed: Tensor, out_features: int, bias: Tensor | None = None) -> Tensor:
    """reference.linear24 for x on a GPU, bf16 or fp16; also on a CPU in Triton's interpreter.

    Raises:
        ValueError: if the shapes do not belong together; TypeError for another dtype.
        RuntimeError: if the GPU's compute capability is below 8.0.
    """
    from cast_serve.kernels.gpu import triton24  # here: the CPU extra need not have Triton

    rows = _checked_rows("linear24", x, packed, out_features, bias, _packed_shape(x.dtype))
    with torch.cuda.device_of(rows):
        out = triton24.linear24(rows, packed, out_features, bias, _num_processors(rows))
    return out.view(*x.shape[:-1], out_features)


def linear24_int8(
    x: Tensor, packed: Tensor, scale: Tensor, out_features: int, bias: Tensor | None = None
) -> Tensor:
    """x @ (weight * scale).T + bias for x on a GPU, bf16 or fp16; also in Triton's interpreter.

    Other than reference.linear24_int8 it does not quantise x.

    Args:
        x: [..., in_features].
        packed: uint8 [tile_rows, tile_columns, 640], see reference.pack.
        scale: fp32 [out_features].
        out_features: rows of the weight.
        bias: [out_features] or None.

    Returns:
        [..., out_features] in x's dtype.

    Raises:
        ValueError, TypeError, RuntimeError: as `linear24`.
    """
    return _linear_int8(x, packed, scale, out_features, bias, is_sparse=True)


def linear24_int4(
    x: Tensor, packed: Tensor, group: int, out_features: int, bias: Tensor | None = None
) -> Tensor:
    """As `linear24_int8` for a 4-bit weight; packed, group: see reference_int4.linear24_int4."""
    from cast_serve.kernels.gpu import triton_int4

    shape_of = functools.partial(int4_packed_shape, group=group)
    rows = _checked_rows("linear24_int4", x, packed, out_features, bias, shape_of)
    processors = _num_processors(rows)
    with torch.cuda.device_of(rows):
        out = triton_int4.linear24_int4(rows, packed, group, out_features, bias, processors)
    return out.view(*x.shape[:-1], out_features)


def linear_int8(
    x: Tensor, packed: Tensor, scale: Tensor, out_features: int, bias: Tensor | None = None
) -> Tensor:
    """As `linear24_int8`, with a dense weight; packed: see reference.pack_dense."""
    return _linear_int8(x, packed, scale, out_features, bias, is_sparse=False)


def linear24_many(
    x: Tensor,
    packed: Tensor,
    out_features: int,
    bias: Tensor | None,
    second: list[Tensor],
    form: str,
) -> Tensor:
    """`linear24`, computed by the second form from the card's crossover on.

    Args:
        x, packed, out_features, bias: as for `linear24`.
        second: what `second_form` returned.
        form: its name, of `FORMS`.
    """
    if x.numel() // x.shape[-1] < crossover(properties(x.device.index).name, form):
        return linear24(x, packed, out_features, bias)
    rows = _checked_rows("linear24_many", x, packed, out_features, bias, _packed_shape(x.dtype))
    return product(rows, second, form, bias).view(*x.shape[:-1], out_features)


def _many_fake(
    x: Tensor,
    packed: Tensor,
    out_features: int,
    bias: Tensor | None,
    second: list[Tensor],
    form: str,
) -> Tensor:
    return x.new_empty(*x.shape[:-1], out_features)


def product(x: Tensor, second: list[Tensor], form: str, bias: Tensor | None = None) -> Tensor:
    """x [num_tokens, in_features] times a second form -> [num_tokens, out_features], x's dtype.

    Args:
        second: what `to_form` returned.
        form: its name.
        bias: [out_features], x's dtype, or None.
    """
    if form == "dense":
        return torch.nn.functional.linear(x, second[0], bias)
    num_tokens = x.shape[0]
    padded = torch.nn.functional.pad(x, (0, 0, 0, -num_tokens % PADDED_TOKENS))
    if form == "cusparselt":
        out = torch._cslt_sparse_mm(second[0], padded.t(), bias=bias, transpose_result=True)
    else:
        values, meta = second
        out = torch._sparse_semi_structured_mm(values, meta, padded.t()).t()
        out = out if bias is None else out + bias
    return out[:num_tokens].contiguous()


def wanted_form() -> str:
    """What ``CAST_CUDA_MANY_TOKENS`` asks for.

    Raises:
        ValueError: if it is not one of `FORMS`.
    """
    form = os.environ.get("CAST_CUDA_MANY_TOKENS", FORMS[0])
    if form not in FORMS:
        raise ValueError(
            f"CAST_CUDA_MANY_TOKENS={form} is not known; choose one of {', '.join(FORMS)}"
        )
    return form


def second_form(
    packed: Tensor, out_features: int, in_features: int, dtype: torch.dtype, form: str
) -> list[Tensor]:
    """What is kept beside a packed weight on a GPU; nothing for the form ``packed``.

    A weight whose dtype or sizes the form does not support gets nothing either, with a warning.

    Args:
        packed: uint8 [tile_rows, tile_columns, tile_bytes], see reference.pack.
        dtype: of the weight, bf16, fp16 or int8.
        form: of `FORMS`.

    Raises:
        RuntimeError: if this torch or this card does not have the form.
    """
    if form == "packed":
        return []
    if dtype == torch.int8:
        _warn_once(
            f"CAST_CUDA_MANY_TOKENS={form} is for weights of 16 bits: those of 8 and 4 bits run "
            "the packed kernel for any number of tokens"
        )
        return []
    multiples = MULTIPLES[form]
    if out_features % multiples[0] or in_features % multiples[1]:
        _warn_once(
            f"linears of [{out_features}, {in_features}] are no multiples of {list(multiples)}, "
            f"which {form} needs: they run the packed kernel for any number of tokens"
        )
        return []
    check_form(form, packed.device)
    values, bitmask = unpack(packed, out_features, in_features, dtype)
    return to_form(decompress(values, bitmask, in_features), form)


def to_form(weight: Tensor, form: str) -> list[Tensor]:
    """A dense 2:4 weight [out_features, in_features], bf16 or fp16, on a GPU -> a second form.

    Returns:
        cusparselt: one tensor of torch's own layout; cutlass: the kept values and their metadata;
        dense: the weight itself.
    """
    if form == "cusparselt":
        return [torch._cslt_compress(weight)]
    if form == "cutlass":
        from torch.sparse import _semi_structured_conversions as conversions

        return list(conversions.sparse_semi_structured_from_dense_cutlass(weight))
    return [weight]


def check_form(form: str, device: torch.device) -> None:
    """Checks that this torch and this card have a second form.

    Raises:
        RuntimeError: if they do not.
    """
    remedy = "set CAST_CUDA_MANY_TOKENS to another form"
    if form == "cusparselt" and not torch.backends.cusparselt.is_available():
        raise RuntimeError(f"torch {torch.__version__} has no cuSPARSELt here; {remedy}")
    if form == "cutlass" and (card := properties(device.index)).major != 8:
        raise RuntimeError(
            f"torch's CUTLASS 2:4 products need compute capability 8.x, but {card.name} has "
            f"{card.major}.{card.minor}; {remedy}"
        )


@functools.cache
def crossover(card: str, form: str) -> int:
    """The number of tokens from which a card uses a second form; warns if it was not measured."""
    measured = json.loads(CROSSOVER.read_text()).get(card, {})
    if form not in measured:
        _warn_once(
            f"{form} was not measured on {card}: it is used from {UNMEASURED_TOKENS} tokens on; "
            "python -m benchmarks.kernels.gpu measures it"
        )
    return int(measured.get(form, UNMEASURED_TOKENS))


@functools.cache
def properties(index: int | None) -> Any:
    """A GPU's properties.

    Raises:
        RuntimeError: if its compute capability is below 8.0.
    """
    card = torch.cuda.get_device_properties(index)
    if card.major < 8:
        raise RuntimeError(
            f"{card.name} has compute capability {card.major}.{card.minor}; the 2:4 kernels need "
            "8.0 or later (A100 and later cards)"
        )
    return card


@functools.cache
def _warn_once(text: str) -> None:
    logger.warning("%s", text)


def _linear_int8(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    out_features: int,
    bias: Tensor | None,
    is_sparse: bool,
) -> Tensor:
    from cast_serve.kernels.gpu import triton_int8

    op = "linear24_int8" if is_sparse else "linear_int8"
    shape_of = _packed_shape(torch.int8) if is_sparse else packed_dense_shape
    rows = _checked_rows(op, x, packed, out_features, bias, shape_of)
    is_float = scale.dtype == torch.float32 and scale.is_contiguous()
    if not is_float or scale.shape != (out_features,) or scale.device != x.device:
        raise ValueError(
            f"{op}: scale is {scale.dtype} {list(scale.shape)} on {scale.device}; a contiguous "
            f"float32 [{out_features}] on {x.device} is needed"
        )
    processors = _num_processors(rows)
    with torch.cuda.device_of(rows):
        out = triton_int8.linear_int8(
            rows, packed, scale, out_features, bias, is_sparse, processors
        )
    return out.view(*x.shape[:-1], out_features)


def _packed_shape(dtype: torch.dtype) -> Callable[[int, int], tuple[int, int, int]]:
    return functools.partial(packed_shape, dtype=dtype)


def _num_processors(x: Tensor) -> int:
    if not x.is_cuda:
        return INTERPRETED_PROCESSORS
    return int(properties(x.device.index).multi_processor_count)


def _checked_rows(
    op: str,
    x: Tensor,
    packed: Tensor,
    out_features: int,
    bias: Tensor | None,
    shape_of: Callable[[int, int], tuple[int, int, int]],
) -> Tensor:
    """x as [num_tokens, in_features], after the same checks as in csrc/ops.cpp."""
    if x.dtype not in (torch.bfloat16, torch.float16):
        raise TypeError(
            f"{op}: x is {x.dtype}; bfloat16 or float16 is needed on a GPU (--dtype bfloat16)"
        )
    if not x.dim():
        raise ValueError(f"{op}: x has no dimension; [..., in_features] is needed")
    in_features = x.shape[-1]
    if in_features == 0 or in_features % 4:
        raise ValueError(f"{op}: in_features {in_features} is no positive multiple of 4")
    shape = shape_of(out_features, in_features)
    if packed.dtype != torch.uint8 or packed.shape != shape or not packed.is_contiguous():
        raise ValueError(
            f"{op}: packed is {packed.dtype} {list(packed.shape)}, but x {list(x.shape)} of "
            f"{x.dtype} and out_features {out_features} need a contiguous uint8 {list(shape)}"
        )
    if packed.data_ptr() % PACKED_ALIGNMENT:
        raise ValueError(
            f"{op}: packed does not begin at a {PACKED_ALIGNMENT}-byte boundary; "
            "pass packed.clone()"
        )
    for name, tensor in (("packed", packed), ("bias", bias)):
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"{op}: x is on {x.device} and {name} on {tensor.device}")
    if bias is not None and bias.shape != (out_features,):
        raise ValueError(f"{op}: bias is {list(bias.shape)}; [{out_features}] is needed")
    return x.reshape(-1, in_features)
