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
from tests.cast_serve.kernels import test_linear24, test_linear24_int8
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

    def to_bytes(self) -> bytes:
        sizes = (*self.x.shape[:1], *self.bias.shape, *self.x.shape[1:], self.packed.numel())
        header = torch.tensor([self.weights, DTYPES.index(self.x.dtype), *sizes])
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
def test_int8_sums_that_are_exact_are_equal_bit_for_bit(
    dtype: torch.dtype, computed: Compute
) -> None:
    products = []
    for shape, num_tokens in cases():
        packed, scale = test_linear24_int8.make(shape)
        bias = torch.randint(-8, 9, shape[:1]).float()
        x = test_linear24_int8.exact_x(num_tokens, shape[1], dtype)
        products.append(Product(1, x, packed, bias, scale))
        dense = torch.randint(-63, 64, shape, dtype=torch.int8)
        products.append(Product(2, x, kernels.pack_dense(dense), bias, scale))
    for product, out in zip(products, computed(products), strict=True):
        assert torch.equal(out, expected_int8(product))


def test_int8_with_any_activations(computed: Compute) -> None:
    products = []
    for shape, num_tokens in cases():
        packed, scale = test_linear24_int8.make(shape)
        x = torch.randn(num_tokens, shape[1]).bfloat16()
        products.append(Product(1, x, packed, torch.randn(shape[0]), scale))
    products[-1].x[2, 7] = float("nan")
    outs = computed(products)
    assert outs[-1][2].isnan().all()
    outs[-1] = outs[-1][3:]
    products[-1].x = products[-1].x[3:]
    for product, out in zip(products, outs, strict=True):
        test_linear24_int8.assert_same_to_rounding(out, expected_int8(product))


def cases() -> list[tuple[tuple[int, int], int]]:
    return [(shape, num_tokens) for shape in SHAPES for num_tokens in NUM_TOKENS]


def expected_int8(product: Product) -> Tensor:
    assert product.scale is not None
    op = reference.linear24_int8 if product.weights == 1 else reference.linear_int8
    return op(product.x, product.packed, product.scale, len(product.bias), product.bias)
