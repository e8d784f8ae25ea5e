"""Packed integers of compressed-tensors 0.12.2 (fixtures/README.md) are read exactly."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from cast_serve.checkpoint.formats import marlin24, pack_quantized
from cast_serve.checkpoint.formats.integers import Integers
from cast_serve.checkpoint.record import CheckpointError
from cast_serve.sparsity.bitmask import decompress
from cast_serve.sparsity.pattern import PatternError

FIXTURES = Path(__file__).parents[1] / "fixtures"
DEQUANTISED = json.loads((FIXTURES / "dequantised.json").read_text())  # fixture: linear: sha256
DOWN = "model.layers.0.mlp.down_proj"
FORMS = {  # bits, and in_features and scales of a row of DOWN
    "int4-packed": (4, 24, 3),
    "int4-packed-channel": (4, 160, 1),
    "int4-packed-group": (4, 96, 3),
    "int8-packed-group": (8, 64, 2),
    "int4-marlin-channel": (4, 128, 1),
    "int4-marlin-group": (4, 384, 3),
    "int8-marlin-channel": (8, 128, 1),
    "int8-marlin-group": (8, 256, 2),
}


def stored(fixture: str, linear: str = DOWN) -> dict[str, Tensor]:
    tensors = load_file(FIXTURES / fixture / "model.safetensors")
    parts = marlin24.PARTS if "marlin" in fixture else pack_quantized.PARTS
    return {part: tensors[f"{linear}.{part}"] for part in parts}


def read(parts: dict[str, Tensor], linear: str = DOWN) -> Integers:
    return (marlin24 if "meta" in parts else pack_quantized).read(linear, parts)


def sha256(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.view(torch.uint8).numpy().tobytes()).hexdigest()


def test_every_form_has_its_hashes() -> None:
    assert DEQUANTISED.keys() == FORMS.keys()
    assert {len(hashes) for hashes in DEQUANTISED.values()} == {7}


@pytest.mark.parametrize("fixture", FORMS)
def test_every_linear_is_the_one_that_was_packed(fixture: str) -> None:
    for linear, expected in DEQUANTISED[fixture].items():
        values, bitmask, scale, _ = read(stored(fixture, linear), linear)
        kept = values.unflatten(1, (scale.shape[1], -1)).float() * scale.float().unsqueeze(-1)
        dense = decompress(kept.flatten(1).to(scale.dtype), bitmask, 2 * values.shape[1])
        assert sha256(dense) == expected, linear


@pytest.mark.parametrize("fixture", FORMS)
def test_what_is_returned(fixture: str) -> None:
    num_bits, in_features, num_scales = FORMS[fixture]
    values, bitmask, scale, found = read(stored(fixture))
    assert found == num_bits
    assert (values.dtype, bitmask.dtype) == (torch.int8, torch.uint8)
    assert (int(values.min()), int(values.max())) == (-(2 ** (found - 1)), 2 ** (found - 1) - 1)
    rows = len(values)
    assert values.shape == (rows, in_features // 2)
    assert bitmask.shape == (rows, in_features // 8)
    assert (scale.dtype, scale.shape) == (
        torch.float16 if "marlin" in fixture else torch.bfloat16,
        (rows, num_scales),
    )


@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("weight_packed", lambda tensor: tensor[:-1]),
        ("weight_packed", lambda tensor: tensor[:, :-1]),
        ("weight_packed", lambda tensor: tensor.flatten()),
        ("weight_packed", lambda tensor: tensor.long()),
        ("weight_packed", lambda tensor: tensor[:0]),
        ("scale_packed", lambda tensor: tensor[:2]),
        ("scale_packed", lambda tensor: tensor[:, :-1]),
        ("scale_packed", lambda tensor: tensor.bfloat16()),
        ("meta", lambda tensor: tensor[:-1]),
        ("meta", lambda tensor: tensor[:, :-1]),
        ("meta", lambda tensor: tensor[:, :1]),
        ("meta", lambda tensor: tensor[:, :96]),  # 48 rows
        ("meta", lambda tensor: tensor.int()),
    ],
)
def test_tensors_of_marlin_that_do_not_belong_together(
    part: str, change: Callable[[Tensor], Tensor]
) -> None:
    parts = stored("int4-marlin-group")
    parts[part] = change(parts[part])
    found = rf"down_proj: .*{part} {parts[part].dtype} \[.* do not belong together; .*copy the dir"
    with pytest.raises(CheckpointError, match=found):
        read(parts)


@pytest.mark.parametrize("rows", [slice(0), slice(48)])
def test_rows_that_are_no_whole_tiles_of_marlin(rows: slice) -> None:
    parts = stored("int4-marlin-channel")
    parts["weight_packed"] = parts["weight_packed"][:, : 2 * rows.stop]
    parts["meta"] = parts["meta"][:, : 2 * rows.stop]
    parts["scale_packed"] = parts["scale_packed"][:, rows]
    with pytest.raises(CheckpointError, match="with N a multiple of 64"):
        read(parts)


@pytest.mark.parametrize(
    ("part", "value", "message"),
    [
        ("weight_packed", torch.zeros(64, 11, dtype=torch.int32), r"weight_packed is torch.int32 "),
        ("weight_packed", torch.zeros(63, 12, dtype=torch.int32), r"int32 \[64, 12\] in 4 bits or"),
        ("weight_packed", torch.zeros(64, 12, dtype=torch.int64), r"_packed is torch.int64 \[64, "),
        ("weight_shape", torch.tensor([64, 96, 1]), r"weight_shape is \[64, 96, 1\], but two"),
        ("weight_shape", torch.tensor([64, -96]), r"weight_shape is \[64, -96\], but two sizes"),
        ("weight_scale", torch.ones(64, 5), r"weight_scale is torch.float32 \[64, 5\], but bf16, "),
        ("weight_scale", torch.ones(64, 48), r"scale groups of a multiple of 4 columns that divid"),
        ("weight_scale", torch.ones(63, 3), r"weight_scale is torch.float32 \[63, 3\]"),
        ("weight_scale", torch.ones(64, 3).int(), r"weight_scale is torch.int32 \[64, 3\]"),
        ("weight_zero_point", torch.ones(8, 3), "weight_zero_point is not 0: asymmetric weights"),
        ("weight_g_idx", torch.arange(96) % 3, "weight_g_idx: .* activation order is not re"),
        ("weight_g_idx", torch.zeros(95).int(), "weight_g_idx: the columns are not in order of"),
    ],
)
def test_tensors_of_pack_quantized_that_are_not_read(
    part: str, value: Tensor, message: str
) -> None:
    with pytest.raises(CheckpointError, match=f"down_proj.*{message}"):
        read(stored("int4-packed-group") | {part: value})


def test_tensors_that_say_nothing_new_are_read() -> None:
    parts = stored("int4-packed-group")
    expected = read(parts)
    for order in (torch.arange(96).int() // 32, torch.full((96,), -1, dtype=torch.int32)):
        zero_point = torch.zeros(64, 3, dtype=torch.int8)
        found = read(parts | {"weight_g_idx": order, "weight_zero_point": zero_point})
        assert all(
            torch.equal(left, right) for left, right in zip(found[:3], expected, strict=False)
        )


def test_a_scale_for_the_whole_weight_is_repeated() -> None:
    parts = stored("int4-packed-channel") | {"weight_scale": torch.tensor([0.5])}
    assert torch.equal(read(parts).scale, torch.full((32, 1), 0.5))


@pytest.mark.parametrize(
    ("fixture", "part"),
    [("int4-packed-group", "weight_shape"), ("int4-marlin-group", "scale_packed")],
)
def test_missing_tensors_are_named(fixture: str, part: str) -> None:
    parts = stored(fixture)
    del parts[part]
    with pytest.raises(CheckpointError, match=rf"down_proj lacks {part} of .* copy the directory"):
        read(parts)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 0.0, -0.5])
@pytest.mark.parametrize(
    ("fixture", "part"),
    [("int4-packed-group", "weight_scale"), ("int4-marlin-group", "scale_packed")],
)
def test_scales_that_are_not_finite_and_positive(fixture: str, part: str, value: float) -> None:
    parts = stored(fixture)
    parts[part].view(-1)[-1] = value
    message = rf"down_proj.{part}: scale 2 of row \d+ is {value}, but .* 1 are wrong .*: copy"
    with pytest.raises(CheckpointError, match=message):
        read(parts)


@pytest.mark.parametrize("group", [0x0, 0x5, 0xF, 0x1])  # twice a column, or the lower one last
def test_meta_that_is_not_two_of_four_is_named(group: int) -> None:
    parts = stored("int8-marlin-channel")
    parts["meta"][1, 5] = parts["meta"][1, 5] & ~0xF | group
    message = r"down_proj.meta: 1 groups of the bitmask .* 2 of 4 bits; .* group 8, with 0"
    with pytest.raises(PatternError, match=message):
        read(parts)


def test_zeros_that_are_not_two_of_four_are_named() -> None:
    parts = stored("int4-packed-group")
    parts["weight_packed"][3, 0] = 0x11111111
    message = r"down_proj: 2 of 1536 groups .* first is row 3, group 0; prune or train the model"
    with pytest.raises(PatternError, match=message):
        read(parts)
