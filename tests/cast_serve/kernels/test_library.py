"""The 2:4 linears where a library's dense product is forced for many tokens, for every CPU kernel.

What is expected is what test_linear24.py and test_linear24_int8.py expect of the other products.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor

from cast_serve import kernels
from cast_serve.kernels.cpu import tuning
from tests.cast_serve.kernels import test_linear24, test_linear24_int8
from tests.cast_serve.kernels.test_linear24_int8 import KINDS, KINDS_AND_DTYPES

SHAPES = [(1, 4), (7, 60), (33, 576), (16, 8192), (601, 260)]
NUM_TOKENS = [32, 33, 130]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
NO_LIBRARY: set[str] = set()


@pytest.fixture(autouse=True)
def forced() -> Iterator[None]:
    """The library from 32 tokens on."""
    kernels.load()
    before = tuning.current()
    tuning.use(replace(before, library=32, library_int8=32))
    yield
    tuning.use(before)


def library_products(call: Callable[[], Tensor]) -> set[str]:
    """Which of torch's dense products a call runs."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # the profiler sees one thread
    try:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            call()
    finally:
        torch.set_num_threads(before)
    return {event.name for event in profile.events()} & {"aten::mm", "aten::addmm"}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_parity(shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight, packed = test_linear24.make(shape, dtype)
    bias = torch.randn(shape[0]).to(dtype)
    for num_tokens in NUM_TOKENS:
        x = torch.randn(num_tokens, shape[1]).to(dtype)
        out = kernels.linear24(x, packed, shape[0], bias)
        test_linear24.assert_is_product(out, x, weight, bias)
        out = kernels.linear24(x, packed, shape[0])
        test_linear24.assert_is_product(out, x, weight)


@pytest.mark.parametrize(("kind", "dtype"), KINDS_AND_DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sums_of_integers_that_are_exact_are_equal_bit_for_bit(
    shape: tuple[int, int], kind: str, dtype: torch.dtype
) -> None:
    linear = test_linear24_int8.make(kind, shape)
    bias = torch.randint(-8, 9, shape[:1]).float()
    for num_tokens in NUM_TOKENS:
        x = test_linear24_int8.exact_x(num_tokens, shape[1], dtype)
        for added in (None, bias.to(dtype)):
            assert torch.equal(linear(x, added), linear.expected(x, added)), num_tokens


@pytest.mark.parametrize(("kind", "dtype"), KINDS_AND_DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_integers_with_any_activations(
    shape: tuple[int, int], kind: str, dtype: torch.dtype
) -> None:
    linear = test_linear24_int8.make(kind, shape, is_exact=False)
    bias = torch.randn(shape[0]).to(dtype)
    for num_tokens in NUM_TOKENS:
        x = (torch.randn(num_tokens, shape[1]) * torch.rand(num_tokens, 1) * 4).to(dtype)
        x[num_tokens // 2, : shape[1] // 2] = 0
        test_linear24_int8.assert_same_to_rounding(linear(x, bias), linear.expected(x, bias))


def test_autocast_does_not_round_the_products() -> None:
    linear = test_linear24_int8.make("int8", (40, 128), is_exact=False)
    x = torch.randn(40, 128)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = linear(x, None)
    assert torch.equal(found, linear(x, None))


def test_the_library_runs_from_the_forced_number_of_tokens_on() -> None:
    _, packed = test_linear24.make((40, 64), torch.bfloat16)
    linears = [test_linear24_int8.make(kind, (40, 128)) for kind in ("int8", "int4-64")]

    def seen(num_tokens: int) -> list[set[str]]:
        x = torch.randn(num_tokens, 64).bfloat16()
        integers = torch.randn(num_tokens, 128).bfloat16()
        of_bf16 = library_products(lambda: kernels.linear24(x, packed, 40))
        of_int8, of_int4 = (library_products(partial(linear, integers)) for linear in linears)
        return [of_bf16, of_int8, of_int4]

    assert seen(32) == [{"aten::mm"}] * 3
    assert seen(31) == [NO_LIBRARY] * 3
    tuning.use(replace(tuning.current(), library=48, library_int8=0))
    assert seen(47) == [NO_LIBRARY] * 3
    assert seen(48) == [{"aten::mm"}, NO_LIBRARY, NO_LIBRARY]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")], ids=str)
def test_nan_and_inf_reach_exactly_the_rows_that_keep_their_column(value: float) -> None:
    weight, packed = test_linear24.make((24, 64), torch.bfloat16)
    x = torch.randn(40, 64).bfloat16()
    x[20, 10] = value
    is_bad = ~kernels.linear24(x, packed, 24).isfinite()
    assert torch.equal(is_bad[20], weight[:, 10] != 0)
    assert is_bad.sum() == (weight[:, 10] != 0).sum()
    assert library_products(lambda: kernels.linear24(x, packed, 24)) == NO_LIBRARY


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")], ids=str)
@pytest.mark.parametrize(("kind", "dtype"), KINDS_AND_DTYPES, ids=str)
def test_nan_and_inf_make_their_tokens_whole_row_nan_with_integers(
    kind: str, dtype: torch.dtype, value: float
) -> None:
    linear = test_linear24_int8.make(kind, (24, 260))
    x = torch.randn(40, 260).to(dtype)
    clean = linear(x)
    x[20, 130] = value
    out = linear(x)
    assert out[20].isnan().all()
    others = torch.arange(40) != 20
    assert torch.equal(out[others], clean[others])


def test_large_values_keep_their_range() -> None:
    weight, packed = test_linear24.make((16, 64), torch.bfloat16)
    x = torch.full((32, 64), 1e30, dtype=torch.bfloat16)
    test_linear24.assert_is_product(kernels.linear24(x, packed, 16), x, weight)


def test_any_leading_dimensions_and_strides() -> None:
    weight, packed = test_linear24.make((40, 132), torch.bfloat16)
    linears = [test_linear24_int8.make(kind, (40, 132)) for kind in KINDS]
    wide = torch.randn(3, 50, 2 * 132).bfloat16()
    transposed = torch.randn(132, 35).bfloat16().T
    for x in (wide[..., :132], wide[:, ::2, 132:], transposed):
        test_linear24.assert_is_product(kernels.linear24(x, packed, 40), x, weight)
        for linear in linears:
            test_linear24_int8.assert_same_to_rounding(linear(x), linear.expected(x))


@pytest.mark.parametrize("num_threads", [1, 2, 3])
def test_any_number_of_threads_in_inference_mode(num_threads: int) -> None:
    """vLLM calls the ops in inference mode, which the threads of a call are not in."""
    weight, packed = test_linear24.make((601, 260), torch.bfloat16)
    linears = [test_linear24_int8.make(kind, (601, 260)) for kind in KINDS]
    x_exact = test_linear24_int8.exact_x(40, 260, torch.bfloat16)
    bias = torch.randn(601).bfloat16()
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        with torch.inference_mode():
            x = torch.randn(40, 260).bfloat16()
            out = kernels.linear24(x, packed, 601, bias)
            outs = [linear(x_exact) for linear in linears]
    finally:
        torch.set_num_threads(before)
    test_linear24.assert_is_product(out, x, weight, bias)
    for linear, exact_out in zip(linears, outs, strict=True):
        assert torch.equal(exact_out, linear.expected(x_exact))


def test_nothing_unwritten_is_read_or_returned() -> None:
    """In deterministic mode torch fills new memory with NaN or the largest integer."""
    weight, packed = test_linear24.make((601, 132), torch.bfloat16)
    linears = [test_linear24_int8.make(kind, (601, 132)) for kind in KINDS]
    x = torch.randn(40, 132).bfloat16()
    x_exact = test_linear24_int8.exact_x(40, 132, torch.float32)
    expected = [linear.expected(x_exact) for linear in linears]
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(1).isnan()
        test_linear24.assert_is_product(kernels.linear24(x, packed, 601), x, weight)
        outs = [linear(x_exact) for linear in linears]
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(*pair) for pair in zip(outs, expected, strict=True))


def test_opcheck() -> None:
    _, packed = test_linear24.make((40, 132), torch.bfloat16)
    linears = [test_linear24_int8.make(kind, (40, 132)) for kind in ("int8", "int4-128")]
    x = torch.randn(40, 132).bfloat16()
    for bias in (None, torch.randn(40).bfloat16()):
        torch.library.opcheck(torch.ops.cast.linear24, (x, packed, 40, bias))
        for linear in linears:
            torch.library.opcheck(linear.op, linear.arguments(x, bias))


def test_compiles_without_a_graph_break() -> None:
    _, packed = test_linear24.make((40, 132), torch.bfloat16)
    int8, int4 = (test_linear24_int8.make(kind, (40, 132)) for kind in ("int8", "int4-32"))
    scale, ops = int8.others[0], torch.ops.cast

    def all_of_them(x: Tensor) -> Tensor:
        out = ops.linear24(x, packed, 40) + ops.linear24_int8(x, int8.packed, scale, 40)
        return out + ops.linear24_int4(x, int4.packed, 32, 40)

    x = test_linear24_int8.exact_x(40, 132, torch.bfloat16)
    compiled = torch.compile(all_of_them, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), all_of_them(x))
