"""The portable kernel compiled for aarch64, emulated, against reference.py. No torch runs there."""

import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from cast_serve import kernels
from cast_serve.kernels import reference
from cast_serve.kernels.cpu import build
from tests.cast_serve.kernels import test_linear24, test_linear24_int8, test_linear64
from tests.programs import need

DRIVER = Path(__file__).with_name("portable.cpp")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)  # in the order of cast::DType
SHAPES = [(1, 4), (7, 60), (33, 260), (129, 132)]
NUM_TOKENS = (1, 4, 5, 33)


@dataclass
class Product:
    """What the driver reads; `packed`'s kind is `weights` (portable.cpp)."""

    weights: int
    x: Tensor
    packed: Tensor
    bias: Tensor
    scale: Tensor | None = None
    group: int = 0
    kept: int = 0

    def to_bytes(self) -> bytes:
        sizes = (*self.x.shape[:1], *self.bias.shape, *self.x.shape[1:], self.packed.numel())
        dtype = DTYPES.index(self.x.dtype)
        header = torch.tensor([self.weights, self.group, self.kept, dtype, *sizes])
        parts = [header, self.x, self.packed, self.scale, self.bias]
        return b"".join(to_bytes(part) for part in parts if part is not None)


def to_bytes(tensor: Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


Compute = Callable[[list[Product]], list[Tensor]]


@pytest.fixture(scope="module")
def computed(tmp_path_factory: pytest.TempPathFactory) -> Compute:
    """Products -> outputs, of a program for aarch64."""
    compiler, emulator = need("aarch64-linux-gnu-g++"), need("qemu-aarch64")
    program = tmp_path_factory.mktemp("aarch64") / "portable"
    sources = [DRIVER, build.SOURCES / "portable.cpp"]
    flags = [*build.COMMON_FLAGS, f"-I{build.SOURCES}", "-Werror", "-static"]
    subprocess.run([compiler, *flags, *sources, "-o", program], check=True)

    def compute(products: list[Product]) -> list[Tensor]:
        given = b"".join(product.to_bytes() for product in products)
        done = subprocess.run([emulator, program], input=given, capture_output=True, check=True)
        left, outs = done.stdout, []
        for product in products:
            shape = (len(product.x), len(product.bias))
            size = shape[0] * shape[1] * product.x.itemsize
            out = torch.frombuffer(bytearray(left[:size]), dtype=product.x.dtype)
            outs.append(out.view(shape))
            left = left[size:]
        assert not left
        return outs

    return compute


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_parity(dtype: torch.dtype, computed: Compute) -> None:
    made = [test_linear24.make(shape, dtype) for shape in SHAPES for _ in NUM_TOKENS]
    products = [
        Product(0, torch.randn(num_tokens, shape[1]).to(dtype), packed, torch.randn(shape[0]))
        for (_, packed), (shape, num_tokens) in zip(made, cases(), strict=True)
    ]
    outs = computed(products)
    assert len(outs) == len(SHAPES) * len(NUM_TOKENS)
    for (weight, _), product, out in zip(made, products, outs, strict=True):
        test_linear24.assert_is_product(out, product.x, weight, product.bias)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sums_of_integers_that_are_exact_are_equal_bit_for_bit(
    dtype: torch.dtype, computed: Compute
) -> None:
    products, expected = [], []
    for shape, num_tokens in cases():
        bias = torch.randint(-8, 9, shape[:1]).float()
        x = test_linear24_int8.exact_x(num_tokens, shape[1], dtype)
        for kind in test_linear24_int8.KINDS:
            linear = test_linear24_int8.make(kind, shape)
            products.append(product_of(kind, linear, x, bias))
            expected.append(linear.expected(x, bias))
        dense = kernels.pack_dense(torch.randint(-63, 64, shape, dtype=torch.int8))
        scale = torch.exp2(torch.randint(-9, -5, shape[:1]).float())
        products.append(Product(3, x, dense, bias, scale))
        expected.append(reference.linear_int8(x, dense, scale, shape[0], bias))
    for out, exact in zip(computed(products), expected, strict=True):
        assert torch.equal(out, exact)


@pytest.mark.parametrize("kind", test_linear24_int8.KINDS)
def test_integers_with_any_activations(kind: str, computed: Compute) -> None:
    products, expected = [], []
    for shape, num_tokens in cases():
        linear = test_linear24_int8.make(kind, shape, is_exact=False)
        x, bias = torch.randn(num_tokens, shape[1]).bfloat16(), torch.randn(shape[0])
        products.append(product_of(kind, linear, x, bias))
        expected.append(linear.expected(x, bias))
    products[-1].x[2, 7] = float("nan")
    outs = computed(products)
    assert outs[-1][2].isnan().all()
    outs[-1], expected[-1] = outs[-1][3:], expected[-1][3:]
    for out, exact in zip(outs, expected, strict=True):
        test_linear24_int8.assert_same_to_rounding(out, exact)


@pytest.mark.parametrize(("kind", "dtype"), test_linear64.KINDS_AND_DTYPES, ids=str)
def test_n_of_64(kind: str, dtype: torch.dtype, computed: Compute) -> None:
    products, expected = [], []
    for shape in test_linear64.SHAPES:
        linear = test_linear64.make(kind, shape, dtype, is_exact=False)
        scale, group = linear.others
        for num_tokens in NUM_TOKENS:
            x, bias = torch.randn(num_tokens, shape[1]).to(dtype), torch.randn(shape[0])
            weights = 2 if group else 0 if scale is None else 1
            products.append(Product(weights, x, linear.packed, bias, scale, group, linear.kept))
            expected.append(linear.expected(x, bias))
    for out, exact in zip(computed(products), expected, strict=True):
        test_linear24_int8.assert_same_to_rounding(out, exact)


def product_of(kind: str, linear: test_linear24_int8.Linear, x: Tensor, bias: Tensor) -> Product:
    group = test_linear24_int8.group_of(kind)
    if group:
        return Product(2, x, linear.packed, bias, group=group)
    (scale,) = linear.others
    assert isinstance(scale, Tensor)
    return Product(1, x, linear.packed, bias, scale)


def cases() -> list[tuple[tuple[int, int], int]]:
    return [(shape, num_tokens) for shape in SHAPES for num_tokens in NUM_TOKENS]
