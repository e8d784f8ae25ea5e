"""Tensors of one linear, of any shape and kind: read as what they say, or refused by name."""

from typing import Any

import torch
from hypothesis import strategies as some
from torch import Tensor

from cast_serve.checkpoint.formats import bitmask, eight_bits
from cast_serve.checkpoint.linear import CompressedLinear, check_scale
from cast_serve.checkpoint.record import CheckpointError
from cast_serve.sparsity.bitmask import compress, decompress, unpack_mask
from cast_serve.sparsity.pattern import PatternError
from tests.fuzz.target import Target

KINDS = (
    *(torch.bfloat16, torch.float16, torch.float32, torch.int8, torch.uint8, torch.int64),
    *(torch.float8_e4m3fn, torch.float8_e5m2, torch.bool, torch.int32, torch.float64),
)
SIZES = some.sampled_from([0, 1, 2, 3, 4, 8, 12, 16])
SHAPES = some.lists(SIZES, max_size=3) | some.tuples(SIZES, SIZES).map(list)
NUMBERS = (0, 1, -1, 0x33, 0x66, 127, -128, float("nan"), float("inf"), 1e-30, 3e38)
DTYPES = some.sampled_from([torch.bfloat16, torch.float16, torch.float32])


@some.composite
def tensors(draw: some.DrawFn) -> Tensor:
    """Any tensor."""
    shape, kind = draw(SHAPES), draw(some.sampled_from(KINDS))
    generator = torch.Generator().manual_seed(draw(some.integers(0, 99)))
    wide = torch.randint(-200, 200, shape, generator=generator).double()
    if wide.numel() and draw(some.booleans()):
        wide.flatten()[0] = draw(some.sampled_from(NUMBERS))
    return wide.nan_to_num(0).to(kind) if not kind.is_floating_point else wide.to(kind)


@some.composite
def parts(draw: some.DrawFn) -> tuple[dict[str, Tensor], torch.dtype]:
    """The parts of a linear that is right, some replaced, left out or added."""
    rows, columns = draw(some.sampled_from([1, 2, 8])), draw(some.sampled_from([4, 8, 12, 16]))
    generator = torch.Generator().manual_seed(draw(some.integers(0, 99)))
    weight = torch.randn(rows, columns, generator=generator)
    weight[:, 2::4] = weight[:, 3::4] = 0
    kind = draw(some.sampled_from(["bf16", "int8", "float8", "zeros"]))
    scale = torch.full((rows, 1), 0.5)
    if kind == "zeros":
        found = {"weight": (weight * 50).to(torch.int8), "weight_scale": scale}
    else:
        linear = CompressedLinear.from_weight("x", weight)
        found = {part.removeprefix("x."): each for part, each in linear.tensors().items()}
        if kind != "bf16":
            dtype = torch.int8 if kind == "int8" else torch.float8_e4m3fn
            found["compressed"] = (linear.values * 50).clamp(-100, 100).to(dtype)
            found["weight_scale"] = scale
    names = ["compressed", "weight", "bitmask", "shape", "weight_scale", "weight_zero_point"]
    for name in draw(some.lists(some.sampled_from(names), max_size=2)):
        if draw(some.booleans()):
            found[name] = draw(tensors())
        else:
            found.pop(name, None)
    if "shape" in found and draw(some.integers(0, 4)) == 0:
        huge = draw(some.sampled_from([[2**62, 2**62], [-1, 8], [0, 0], [rows, 2**40], [8, -8]]))
        found["shape"] = torch.tensor(huge).unsqueeze(1)
    return found, draw(DTYPES)


def check_linear(drawn: tuple[dict[str, Tensor], torch.dtype]) -> None:
    """As `convert` and `inspect` read a linear."""
    found, dtype = drawn
    for read in (
        lambda: CompressedLinear.from_parts("x", found),
        lambda: bitmask.read("x", found, dtype),
        lambda: eight_bits.read("x", found, dtype),
    ):
        try:
            linear = read()
        except (CheckpointError, PatternError):
            continue
        dense = linear.dense()
        assert list(dense.shape) == [linear.values.shape[0], linear.in_features]
        assert dense.unflatten(1, (-1, 4)).ne(0).sum(-1).max() <= 2
        if linear.scale is not None:
            check_scale("x", linear.scale, linear.values.shape[0])


def check_bitmask(drawn: tuple[Tensor, Tensor, int]) -> None:
    """As the codec reads and writes."""
    values, bitmask, in_features = drawn
    try:
        dense = decompress(values, bitmask, in_features)
    except PatternError:
        dense = None
    if dense is not None:
        assert list(dense.shape) == [values.shape[0], in_features]
    try:
        mask = unpack_mask(bitmask, in_features)
    except PatternError:
        return
    assert mask.unflatten(1, (-1, 4)).sum(-1).eq(2).all()


def check_compress(weight: Any) -> None:
    """Whatever is compressed comes back."""
    try:
        values, bitmask = compress(weight)
    except PatternError:
        return
    assert torch.equal(decompress(values, bitmask, weight.shape[1]), weight + 0)


COLUMNS = some.sampled_from([-8, 0, 1, 2, 4, 8, 16, 2**40])
TARGETS = (
    Target("linear", parts(), check_linear),
    Target("bitmask", some.tuples(tensors(), tensors(), COLUMNS), check_bitmask),
    Target("compress", tensors(), check_compress),
)
