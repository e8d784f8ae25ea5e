"""Packed checkpoints of compressed-tensors 0.12.2 (fixtures/README.md) become ours, exactly."""

import hashlib
import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from cast_serve.checkpoint.convert import check_converted, convert
from cast_serve.checkpoint.formats import pack_quantized
from cast_serve.checkpoint.formats.packed import taken_over
from cast_serve.checkpoint.inspect import count_sparse, inspect
from cast_serve.checkpoint.linear import CompressedLinear
from cast_serve.checkpoint.quantization import Quantization
from cast_serve.checkpoint.record import CheckpointError
from cast_serve.model import SparseLinear, load
from cast_serve.sparsity.pattern import PatternError
from cast_serve.sparsity.quantize import SCALES_TAKEN_OVER
from tests.cast_serve.checkpoint.test_convert import all_tensors, edit_json

FIXTURES = Path(__file__).parent / "fixtures"
DEQUANTISED = json.loads((FIXTURES / "dequantised.json").read_text())  # fixture: linear: sha256
UP = "model.layers.0.mlp.up_proj"
BECOMES = {  # values and scale group of what each is converted to; None: unquantised
    "int4-packed-channel": ("int4", 128),
    "int4-packed-group": ("int4", 32),
    "int4-marlin-channel": ("int4", 128),
    "int4-marlin-group": ("int4", 128),
    "int8-marlin-channel": ("int8", None),
    "int4-packed": (None, None),
    "int8-packed-group": (None, None),
    "int8-marlin-group": (None, None),
}
TOKENS = torch.arange(24).view(2, 12)


def copy_of(name: str, tmp_path: Path, **changes: Tensor | None) -> Path:
    """A fixture with tensors of UP exchanged, or left out."""
    folder = Path(shutil.copytree(FIXTURES / name, tmp_path / name))
    tensors = all_tensors(folder)
    for part, value in changes.items():
        if value is None:
            del tensors[f"{UP}.{part}"]
        else:
            tensors[f"{UP}.{part}"] = value
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def edit_quantization(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    edit_json(folder / "config.json", quantization_config=config | changes)


def test_every_packed_fixture_is_here() -> None:
    names = {path.name for path in FIXTURES.glob("*-packed*")} | {
        path.name for path in FIXTURES.glob("*-marlin-*")
    }
    assert names - {"int4-packed-asymmetric"} == BECOMES.keys() == DEQUANTISED.keys()


@pytest.mark.parametrize("name", BECOMES)
def test_weights_are_those_that_compressed_tensors_dequantises(name: str, tmp_path: Path) -> None:
    summary = convert(FIXTURES / name, tmp_path / "out", tmp_path / "twin")
    assert (summary["quantized"], summary["scale_group"]) == BECOMES[name]
    assert (summary["kind"], summary["num_sparse_layers"], summary["head"]) == (
        "compressed",
        7,
        None,
    )
    out, twin = all_tensors(tmp_path / "out"), all_tensors(tmp_path / "twin")
    before = all_tensors(FIXTURES / name)
    assert len(DEQUANTISED[name]) == 7
    for linear, expected in DEQUANTISED[name].items():
        parts = {key.rpartition(".")[2]: out[key] for key in out if key.startswith(f"{linear}.")}
        assert parts.keys() <= {"compressed", "weight_packed", "bitmask", "shape", "weight_scale"}
        for dense in (twin[f"{linear}.weight"], CompressedLinear.from_parts(linear, parts).dense()):
            data = dense.contiguous().view(torch.uint8).numpy().tobytes()
            assert hashlib.sha256(data).hexdigest() == expected, linear
    others = [key for key in before if key.rpartition(".")[0] not in DEQUANTISED[name]]
    assert len(others) == 4  # the embedding and three norms
    assert all(torch.equal(out[key], before[key]) for key in others)
    check_converted(FIXTURES / name, tmp_path / "out")


@pytest.mark.parametrize("name", BECOMES)
def test_the_least_integers_stay(name: str, tmp_path: Path) -> None:
    """-8 and -128, which our own quantisers do not write."""
    quantized, scale_group = BECOMES[name]
    convert(FIXTURES / name, tmp_path / "out")
    record = json.loads((tmp_path / "out/cast.json").read_text())["quantization"]
    if quantized is None:
        assert record is None
        return
    assert (record["quantize"], record["scales"]) == (quantized, SCALES_TAKEN_OVER)
    assert record.get("scale_group") == scale_group
    tensors = all_tensors(tmp_path / "out")
    parts = {key.rpartition(".")[2]: tensors[key] for key in tensors if key.startswith(UP)}
    least = int(CompressedLinear.from_parts(UP, parts).values.min())
    assert least == {"int4": -8, "int8": -128}[quantized]


@pytest.mark.parametrize("name", BECOMES)
def test_it_answers_as_its_dequantised_twin(name: str, tmp_path: Path) -> None:
    """The twin's activations are not rounded, so with integers the two are close and not equal."""
    convert(FIXTURES / name, tmp_path / "out", tmp_path / "twin")
    model = load(tmp_path / "out", torch.float32)
    assert sum(isinstance(module, SparseLinear) for module in model.modules()) == 7
    twin = AutoModelForCausalLM.from_pretrained(tmp_path / "twin", dtype=torch.float32)
    with torch.no_grad():
        found, wanted = model(TOKENS).logits, twin(TOKENS).logits
    error = float((found - wanted).norm() / wanted.norm())
    assert error < (1e-5 if BECOMES[name][0] is None else 1e-2)


def test_what_changes_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        convert(FIXTURES / "int4-packed-group", tmp_path / "int4")
    assert "activations are not quantised, but serving quantises them" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        convert(FIXTURES / "int8-packed-group", tmp_path / "bf16")
    assert (
        "no kernel supports the scale groups of its int8 weights, so they become torch.bfloat16"
        in (caplog.text)
    )
    assert "activations" not in caplog.text
    assert (
        convert(tmp_path / "bf16", tmp_path / "int8", quantization=Quantization("int8"))[
            "quantized"
        ]
        == "int8"
    )


@pytest.mark.parametrize("sparsity_format", ["dense", "sparse-24-bitmask"])
def test_the_older_key_and_any_sparsity_config(sparsity_format: str, tmp_path: Path) -> None:
    source = copy_of("int4-marlin-group", tmp_path)
    config = json.loads((source / "config.json").read_text())
    config["compression_config"] = config.pop("quantization_config") | {
        "sparsity_config": {"format": sparsity_format, "targets": ["Linear"]}
    }
    (source / "config.json").write_text(json.dumps(config))
    convert(source, tmp_path / "out")
    convert(FIXTURES / "int4-marlin-group", tmp_path / "expected")
    found, expected = all_tensors(tmp_path / "out"), all_tensors(tmp_path / "expected")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in found)
    assert "compression_config" not in json.loads((tmp_path / "out/config.json").read_text())


@pytest.mark.parametrize(("group_size", "becomes"), [(64, 64), (96, 32), (256, 128)])
def test_scale_groups_of_every_size_that_has_a_kernel(group_size: int, becomes: int) -> None:
    word = 0x78888879  # 1, -1 twice, and zeros
    parts = {
        "weight_packed": torch.full((2, 2 * group_size // 8), word, dtype=torch.int32),
        "weight_scale": torch.tensor([[1.0, 2.0], [3.0, 4.0]]),
        "weight_shape": torch.tensor([2, 2 * group_size]),
    }
    found = taken_over("q", pack_quantized.read("q", parts), becomes)
    assert found.scale is not None
    assert found.scale.shape == (2, 2 * group_size // becomes)
    weight = found.dense()
    assert torch.equal(weight[0, :8], torch.tensor([1.0, -1, 0, 0, 0, 0, 0, -1]))
    assert torch.equal(weight[1, -8:], torch.tensor([4.0, -4, 0, 0, 0, 0, 0, -4]))


def refused(source: Path, tmp_path: Path, message: str) -> None:
    with pytest.raises((CheckpointError, PatternError), match=message):
        convert(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "part", "value", "message"),
    [
        (
            "int4-marlin-group",
            "scale_packed",
            torch.full((1, 384), torch.nan).half(),
            "is nan, but",
        ),
        ("int4-marlin-group", "weight_packed", None, rf"no weight for its targets \['{UP}'\]"),
        ("int4-marlin-group", "meta", None, "lacks meta of marlin-24"),
        ("int4-marlin-group", "meta", torch.zeros(4, 768).short(), "up_proj.meta: 12288 groups of"),
        ("int4-marlin-group", "meta", torch.zeros(3, 768).short(), r"meta torch.int16 \[3, 768\] "),
        ("int4-packed-group", "weight_scale", None, "lacks weight_scale of pack-quantized"),
        ("int4-packed-group", "weight_scale", torch.zeros(96, 2), "scale 0 of row 0 is 0.0, but"),
        ("int4-packed-group", "weight_scale", torch.ones(96, 4), "for each 16 columns, but config"),
        (
            "int4-packed-group",
            "weight_packed",
            torch.zeros(96, 8).int(),
            "1536 of 1536 groups do no",
        ),
        ("int4-packed-group", "weight_g_idx", torch.arange(64) % 2, "activation order is not read"),
        (
            "int8-marlin-channel",
            "scale_packed",
            torch.ones(2, 128).half(),
            "do not belong together",
        ),
    ],
)
def test_damage_is_named(
    name: str, part: str, value: Tensor | None, message: str, tmp_path: Path
) -> None:
    refused(copy_of(name, tmp_path, **{part: value}), tmp_path, message)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"num_bits": 3}, "type int in 3 bits, packed, but only int in 4 or 8 bits is read; start"),
        ({"num_bits": None}, "type int in None bits"),
        ({"type": "float"}, "type float in 4 bits"),
        ({"symmetric": False}, "is quantised asymmetrically"),
        (
            {"strategy": "block"},
            "for each block of a weight, but only one for each channel or tens",
        ),
        ({"num_bits": 8, "strategy": "channel"}, "config.json says another strategy or group_size"),
    ],
)
def test_what_is_not_read_is_named(
    weights: dict[str, object], message: str, tmp_path: Path
) -> None:
    source = copy_of("int4-packed-group", tmp_path)
    groups = json.loads((source / "config.json").read_text())["quantization_config"][
        "config_groups"
    ]
    groups["group_0"]["weights"] |= weights
    edit_quantization(source, config_groups=groups)
    refused(source, tmp_path, message)


def test_a_real_asymmetric_checkpoint_is_refused(tmp_path: Path) -> None:
    refused(FIXTURES / "int4-packed-asymmetric", tmp_path, "is quantised asymmetrically")


def test_what_config_json_does_not_say_is_named(tmp_path: Path) -> None:
    source = copy_of("int4-marlin-group", tmp_path)
    groups = json.loads((source / "config.json").read_text())["quantization_config"][
        "config_groups"
    ]
    eight = {"weights": groups["group_0"]["weights"] | {"num_bits": 8}}
    edit_quantization(source, config_groups={**groups, "group_1": eight})
    refused(source, tmp_path, r"in 4 bits \(strategy group, group_size 128\) and in 8 bits \(")
    edit_quantization(source, config_groups={})
    refused(source, tmp_path, "says format 'marlin-24' with 0 config_groups; .* copy config.json")
    edit_json(source / "config.json", quantization_config=None)
    refused(source, tmp_path, "says format None with 0 config_groups")


def test_a_packed_head_is_refused(tmp_path: Path) -> None:
    source = copy_of("int4-marlin-group", tmp_path)
    tensors = all_tensors(source)
    tensors["lm_head.weight_packed"] = tensors[f"{UP}.weight_packed"].clone()
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    refused(source, tmp_path, r"lm_head.weight_packed is packed, but only linears other than")


def test_what_cannot_be_served_or_quantised_as_it_is(tmp_path: Path) -> None:
    for name in ("int4-marlin-group", "int8-marlin-channel"):
        with pytest.raises(
            CheckpointError, match="format marlin-24, which vLLM does not .*convert"
        ):
            count_sparse(FIXTURES / name)
    assert count_sparse(FIXTURES / "int4-packed-group") == (0, False)  # dense, by vLLM
    for name in ("int4-marlin-group", "int4-packed-group", "int8-packed-group"):
        with pytest.raises(
            CheckpointError, match="in the form of another program; convert it first"
        ):
            inspect(FIXTURES / name)
        with pytest.raises(CheckpointError, match=r"is already quantised \(int[48]\)"):
            convert(FIXTURES / name, tmp_path / "out", quantization=Quantization("int4"))


def test_widened_weights_that_are_too_large_are_named(tmp_path: Path) -> None:
    source = copy_of("int8-packed-group", tmp_path, weight_scale=torch.full((64, 1), 6e2))
    edit_json(source / "config.json", dtype="float16")
    refused(source, tmp_path, r"up_proj: row \d+ of its integers .* more than 6.55e\+04, the most")
