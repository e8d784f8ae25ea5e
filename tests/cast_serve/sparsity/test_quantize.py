import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from cast_serve.sparsity import quantize
from cast_serve.sparsity.quantize import (
    FRACTIONS,
    INT4_FRACTIONS,
    INT4_SCALE_GROUPS,
    SCALE_GROUP,
    dequantize,
    dequantize_int4,
    quantize_groups,
    quantize_rows,
    quantize_values_int4,
    rounded,
)

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def random_weight(rows: int, columns: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.rand(rows, 1, generator=generator) * 0.1
    return (torch.randn(rows, columns, generator=generator) * sizes).to(dtype)


def squared_error(weight: Tensor, scale: Tensor) -> Tensor:
    """Of each row under a scale [N, 1] of the weight's dtype, in fp64 and written out plainly."""
    integers = (weight.double() / scale.double()).round().clamp(-127, 127)
    return (integers * scale.double() - weight.double()).square().sum(1)


@given(
    rows=st.integers(1, 5),
    columns=st.integers(1, 70),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
)
def test_the_scale_is_the_best_of_the_grid(
    rows: int, columns: int, dtype: torch.dtype, seed: int
) -> None:
    weight = random_weight(rows, columns, dtype, seed)
    values, scale = quantize_rows(weight)
    assert (values.dtype, scale.dtype) == (torch.int8, dtype)
    assert (values.shape, scale.shape) == (weight.shape, (rows, 1))
    largest = weight.float().abs().amax(1, keepdim=True)
    assert (scale > 0).all()
    errors = torch.stack(
        [squared_error(weight, (largest / 127 * f).to(dtype)) for f in FRACTIONS if f <= 1]
    )
    found = (values.double() * scale.double() - weight.double()).square().sum(1)
    torch.testing.assert_close(found, errors.amin(0), rtol=1e-4, atol=0)
    assert (found <= errors[0] * (1 + 1e-4)).all()  # FRACTIONS[0] is max scaling


def test_least_squares_is_better_than_max_scaling_on_long_rows() -> None:
    weight = random_weight(8, 2048, torch.float32)
    _, scale = quantize_rows(weight)
    largest = weight.abs().amax(1, keepdim=True)
    assert FRACTIONS[0] == 1
    assert squared_error(weight, scale).sum() < 0.99 * squared_error(weight, largest / 127).sum()


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_on_the_grid_comes_back_exactly(dtype: torch.dtype) -> None:
    integers = torch.randint(-127, 128, (6, 40), generator=torch.Generator().manual_seed(1))
    integers[:, 7] = 127
    scale = 2.0 ** -torch.arange(3, 9).view(6, 1)
    weight = (integers * scale).to(dtype)  # 7 bits: exact in every dtype
    values, found = quantize_rows(weight)
    assert torch.equal(values, integers.to(torch.int8))
    assert torch.equal(found, scale.to(dtype))
    assert torch.equal(dequantize(values, found), weight)


def test_zeros_do_not_change_a_rows_scale() -> None:
    weight = random_weight(6, 64, torch.bfloat16)
    with_zeros = torch.stack([weight, torch.zeros_like(weight)], dim=-1).flatten(1)
    values, scale = quantize_rows(with_zeros)
    expected, expected_scale = quantize_rows(weight)
    assert torch.equal(scale, expected_scale)
    assert torch.equal(values[:, ::2], expected)
    assert not values[:, 1::2].any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_zeros_and_of_tiny_weights_get_a_positive_scale(dtype: torch.dtype) -> None:
    weight = torch.zeros(3, 8, dtype=dtype)
    weight[1, 2] = torch.finfo(dtype).tiny
    weight[2, 3] = 2.0**-24  # fp16's smallest
    values, scale = quantize_rows(weight)
    assert scale[0] == 1
    assert (torch.isfinite(scale) & (scale > 0)).all()
    assert not values[0].any()
    torch.testing.assert_close(dequantize(values, scale)[2], weight[2], rtol=0.01, atol=0)


def test_slabs_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = random_weight(7, 24, torch.bfloat16)
    whole = quantize_rows(weight)
    threads = torch.get_num_threads()
    for elements in (1, 48, 50):
        monkeypatch.setattr(quantize, "SLAB_ELEMENTS", elements)
        assert all(map(torch.equal, quantize_rows(weight), whole))
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
def test_a_weight_that_is_not_finite_is_refused(
    bad: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantize, "SLAB_ELEMENTS", 16)
    weight = random_weight(7, 8, torch.bfloat16)
    weight[5, 3] = bad
    with pytest.raises(ValueError, match="model.q: row 5 holds Inf or NaN"):
        quantize_rows(weight, "model.q")


def test_meta() -> None:
    values, scale = quantize_rows(torch.empty(6, 20, device="meta", dtype=torch.bfloat16))
    assert (values.shape, values.dtype) == ((6, 20), torch.int8)
    assert (scale.shape, scale.dtype) == ((6, 1), torch.bfloat16)
    values, scale = quantize_values_int4(torch.empty(6, 20, device="meta"), 32)
    assert (values.shape, scale.shape) == ((6, 20), (6, 2))


@pytest.mark.parametrize("scale_group", INT4_SCALE_GROUPS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_int4_takes_the_best_scale_of_each_group(scale_group: int, dtype: torch.dtype) -> None:
    kept = random_weight(5, 288, dtype)  # of 576 columns: with 128, the last group has 64
    values, scale = quantize_values_int4(kept, scale_group)
    assert (values.dtype, values.shape) == (torch.int8, kept.shape)
    assert (scale.dtype, scale.shape) == (dtype, (5, -(-576 // scale_group)))
    assert values.abs().max() == 7
    found = dequantize_int4(values, scale, scale_group, torch.float32)
    half = scale_group // 2
    for group, own in enumerate(kept.split(half, dim=1)):
        largest = own.float().abs().amax(1, keepdim=True)
        errors = []
        for fraction in INT4_FRACTIONS:
            step = (largest / 7 * fraction).bfloat16().to(dtype).double()
            integers = (own.double() / step).round().clamp(-7, 7)
            errors.append((integers * step - own.double()).square().sum(1))
        columns = slice(group * half, (group + 1) * half)
        error = (found[:, columns].double() - own.double()).square().sum(1)
        torch.testing.assert_close(error, torch.stack(errors).amin(0), rtol=1e-4, atol=0)


def test_what_is_on_the_int4_grid_comes_back_exactly() -> None:
    integers = torch.randint(-7, 8, (6, 80), generator=torch.Generator().manual_seed(1))
    integers[:, ::16] = 7
    scale = 2.0 ** -torch.arange(3, 33).view(6, 5)
    weight = dequantize_int4(integers.to(torch.int8), scale, 32, torch.bfloat16)
    assert torch.equal(weight[:, 16:32].float(), integers[:, 16:32] * scale[:, 1:2])
    values, found = quantize_values_int4(weight, 32)
    assert torch.equal(values, integers.to(torch.int8))
    assert torch.equal(found, scale.to(torch.bfloat16))


@pytest.mark.parametrize("bits", [8, 4])
def test_the_scale_fits_the_important_weights(bits: int) -> None:
    """What is multiplied with zeros alone has no importance, and does not stretch the scale."""
    weight = random_weight(4, 128, torch.float32)
    importance = torch.ones_like(weight)
    weight[:, ::16], importance[:, ::16] = 1.09 * weight.abs().amax(1, keepdim=True), 0
    if bits == 8:
        values, scale = quantize_rows(weight, importance=importance)
        found, plain = dequantize(values, scale), dequantize(*quantize_rows(weight))
    else:
        values, scale = quantize_values_int4(weight, 32, importance=importance)
        found = dequantize_int4(values, scale, 32)
        plain = dequantize_int4(*quantize_values_int4(weight, 32), 32)
    errors = [((kept - weight).square() * importance).sum(1) for kept in (found, plain)]
    assert errors[0].sum() < 0.9 * errors[1].sum()
    assert (errors[0] <= errors[1]).all()


def test_int4_scales_are_exact_in_bf16() -> None:
    _, scale = quantize_values_int4(random_weight(6, 160, torch.float32), 32)
    assert torch.equal(scale, scale.bfloat16().float())


def test_int4_groups_of_zeros_get_scale_1() -> None:
    weight = torch.zeros(2, 96, dtype=torch.bfloat16)
    weight[1, 70] = 3.5
    values, scale = quantize_values_int4(weight)
    assert scale[0].tolist() == [1, 1]
    assert dequantize_int4(values, scale, 128)[1, 70] == 3.5
    assert int((values != 0).sum()) == 1


def test_int4_refuses_what_has_no_scale() -> None:
    weight = random_weight(7, 96, torch.bfloat16)
    weight[5, 90] = torch.nan
    with pytest.raises(ValueError, match="model.q: row 5 holds Inf or NaN"):
        quantize_values_int4(weight, 64, "model.q")
    with pytest.raises(ValueError, match="scale group of 96 columns does not exist; use 128"):
        quantize_values_int4(weight, 96)


def test_groups_are_rounded_half_to_even_by_their_largest_value() -> None:
    x = torch.tensor([[127.0, 0.5, 1.5, -2.5, -127.0], [254.0, 3.0, -5.0, 0.0, 1.0]])
    values, scale = quantize_groups(x)
    assert scale.tolist() == [[1.0], [2.0]]
    assert values[:, 0, :5].tolist() == [[127, 0, 2, -2, -127], [127, 2, -2, 0, 0]]
    assert not values[:, 0, 5:].any()
    assert (values.dtype, scale.dtype) == (torch.int8, torch.float32)
    assert rounded(x).tolist() == [[127, 0, 2, -2, -127], [254, 4, -4, 0, 0]]


@pytest.mark.parametrize("dtype", DTYPES)
def test_activations_come_back_within_half_a_step(dtype: torch.dtype) -> None:
    x = random_weight(9, 300, dtype)
    values, scale = quantize_groups(x)
    assert values.abs().amax(-1).eq(127).all()
    steps = scale.repeat_interleave(SCALE_GROUP, dim=1)[:, :300]
    assert ((rounded(x.float()) - x.float()).abs() <= steps * 0.5001).all()
    assert torch.equal(rounded(x), rounded(x.float()).to(dtype))


def test_a_group_of_zeros_or_of_almost_nothing() -> None:
    x = torch.zeros(2, 4)
    x[1, 1] = 1e-45  # max / 127 is 0 in fp32
    values, scale = quantize_groups(x)
    assert scale.tolist() == [[0], [0]]
    assert not values.any()


@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
def test_what_is_not_finite_makes_its_own_group_nan(bad: float) -> None:
    x = random_weight(3, 256, torch.bfloat16)
    expected = rounded(x)
    x[1, 4] = bad
    found = rounded(x)
    assert found[1, :128].isnan().all()
    found[1, :128] = expected[1, :128]
    assert torch.equal(found, expected)
