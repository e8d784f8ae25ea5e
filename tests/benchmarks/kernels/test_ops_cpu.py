"""The ops that are timed give one product; an op that does not is named."""

import importlib.util

import pytest
import torch

from benchmarks.kernels import ops_cpu, shapes
from cast_serve.sparsity.bitmask import decompress

pytest.importorskip("vllm", reason="comes with the cpu and gpu extras")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.mark.parametrize(
    # of 13,824, 10,240, 6,400 and 7,168 bytes: two tiles wide; dense 24,576 and int8 12,288
    ("weights", "num_layers"),
    [("bf16", 3), ("int8", 4), ("int4", 7), ("int4-32", 6)],
)
@pytest.mark.parametrize("kept", [None, 32])
def test_every_op_has_layers_of_the_same_product(
    weights: str, num_layers: int, kept: int | None
) -> None:
    layers = ops_cpu.layers_of(192, 64, weights, cache_bytes=40_000, kept=kept)
    if kept is not None:  # another weight, in the same bytes
        assert len(layers.pop("sparse24")) == num_layers
    names = {"sparse", "vllm_dense", "plain_dense"}
    names |= {"vllm_int8"} if weights != "bf16" else set()
    if importlib.util.find_spec("zentorch") is not None:
        names |= {"zentorch"} | ({"zentorch_int8"} if weights != "bf16" else set())
    assert set(layers) == names
    for name, of_op in layers.items():
        of_others = 4 if name.endswith("int8") else 2
        assert len(of_op) == (num_layers if name == "sparse" else of_others), name
    x = torch.randn(3, 192).bfloat16()
    expected = layers["plain_dense"][0](x).float()
    for name, of_op in layers.items():
        for layer in of_op:
            out = layer(x)
            assert (out.shape, out.dtype) == ((3, 64), torch.bfloat16), name
            assert (out.float() - expected).norm() < 0.02 * expected.norm(), name


@pytest.mark.parametrize("factor", [1.03, torch.nan])
def test_an_op_with_another_product_is_named(factor: float) -> None:
    weight = torch.randn(32, 64)

    def right(x: torch.Tensor) -> torch.Tensor:
        return x.float() @ weight.T

    ops_cpu.check({"right": [right]}, weight)
    message = r"^wrong is wrong at \[32, 64\] and 1 token\(s\): its error is (0.030|nan)"
    with pytest.raises(RuntimeError, match=message):
        ops_cpu.check({"right": [right], "wrong": [lambda x: right(x) * factor]}, weight)


def test_a_random_int8_weight_is_2_4_with_scales_that_bf16_has() -> None:
    values, bitmask, scale = shapes.random_weight(64, 32, "int8")
    assert scale is not None
    assert (values.shape, values.dtype) == ((32, 32), torch.int8)
    assert int(values.abs().max()) <= 127
    assert int(values.abs().max()) > 100
    assert torch.equal(scale.bfloat16().float(), scale)
    assert len(scale.unique()) > 16
    dense = decompress(values, bitmask, 64)  # raises where a group has not exactly two bits
    assert int(dense.count_nonzero()) == int(values.count_nonzero())


@pytest.mark.parametrize("weights", ["int4", "int4-32"])
def test_a_random_int4_weight_is_2_4_with_a_scale_for_each_group(weights: str) -> None:
    values, bitmask, scale = shapes.random_weight(192, 32, weights)
    assert scale is not None
    assert (int(values.min()), int(values.max())) == (-7, 7)
    assert (scale.shape, scale.dtype) == ((32, {"int4": 2, "int4-32": 6}[weights]), torch.bfloat16)
    dense = decompress(values, bitmask, 192)  # raises where a group has not exactly two bits
    assert int(dense.count_nonzero()) == int(values.count_nonzero())
