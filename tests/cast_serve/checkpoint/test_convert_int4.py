"""convert --quantize int4: what is stored, what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from cast_serve.checkpoint.convert import check_converted, convert
from cast_serve.checkpoint.inspect import count_sparse, inspect
from cast_serve.checkpoint.quantization import Quantization
from cast_serve.checkpoint.record import CheckpointError
from cast_serve.sparsity.bitmask import compress, decompress
from cast_serve.sparsity.nibbles import unpack_nibbles
from cast_serve.sparsity.pattern import hard_mask
from cast_serve.sparsity.quantize import (
    INT4_SCALES_CHOSEN,
    dequantize_int4,
    quantize_values_int4,
)
from tests.cast_serve.checkpoint.test_convert import all_tensors
from tests.cast_serve.conftest import Save
from tests.cast_serve.tiny import tiny_gpt2, tiny_llama

UP, DOWN = "model.layers.0.mlp.up_proj", "model.layers.0.mlp.down_proj"


@pytest.mark.parametrize("scale_group", [128, 64, 32])
def test_values_are_those_of_the_kept_weights(
    scale_group: int, save_gated: Save, tmp_path: Path
) -> None:
    source, out, twin = save_gated(tiny_llama()), tmp_path / "out", tmp_path / "twin"
    summary = convert(
        source, out, twin, quantization=Quantization("int4", scale_group=scale_group, head="int8")
    )
    assert (summary["quantized"], summary["head"]) == ("int4", "int8")
    assert summary["num_sparse_layers"] == 14
    before, after, dense = all_tensors(source), all_tensors(out), all_tensors(twin)
    cast = json.loads((out / "cast.json").read_text())
    for name in cast["targets"]:
        kept, bitmask = compress(before[f"{name}.weight"] * hard_mask(before[f"{name}.gate"]))
        values, scale = quantize_values_int4(kept, scale_group)
        assert f"{name}.compressed" not in after
        assert torch.equal(unpack_nibbles(after[f"{name}.weight_packed"], kept.shape[1]), values)
        assert torch.equal(after[f"{name}.weight_scale"], scale)
        assert torch.equal(after[f"{name}.bitmask"], bitmask)
        weight = decompress(dequantize_int4(values, scale, scale_group), bitmask, 2 * kept.shape[1])
        assert torch.equal(dense[f"{name}.weight"], weight)
    assert after["lm_head.weight"].dtype == torch.int8
    assert cast["quantization"] == {
        "quantize": "int4",
        "head": "int8",
        "scale_group": scale_group,
        "scales": INT4_SCALES_CHOSEN,
    }
    AutoModelForCausalLM.from_pretrained(twin, dtype=torch.bfloat16)
    assert count_sparse(out) == (14, False)


def test_bits_stored_are_told(
    save_gated: Save, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Of tiny linears: 3 bits a weight, and 16 of a scale for 32 columns."""
    out = tmp_path / "out"
    summary = convert(
        save_gated(tiny_llama()), out, quantization=Quantization("int4", scale_group=32)
    )
    assert (summary["bits_per_weight"], summary["scale_group"]) == (3.5, 32)
    assert summary["total_weight_bytes"] == sum(t.nbytes for t in all_tensors(out).values())
    assert "in 4 bits" in (out / "README.md").read_text()
    assert "4-bit values are rounded to nearest, which costs much" in caplog.text


def test_a_transposed_weight(save_gated: Save, tmp_path: Path) -> None:
    summary = convert(save_gated(tiny_gpt2()), tmp_path / "out", quantization=Quantization("int4"))
    assert (summary["quantized"], summary["num_sparse_layers"]) == ("int4", 4)


@pytest.mark.parametrize("head", [None, "int8"])
def test_config_is_what_compressed_tensors_reads(
    head: Any, save_gated: Save, tmp_path: Path
) -> None:
    convert(
        save_gated(tiny_llama()),
        tmp_path / "out",
        quantization=Quantization("int4", scale_group=64, head=head),
    )
    config = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    assert config["format"] == "pack-quantized"
    assert config["sparsity_config"]["format"] == "sparse-24-bitmask"
    assert config["ignore"] == ([] if head else ["lm_head"])
    library = pytest.importorskip("compressed_tensors.quantization", reason="with vLLM")
    fields = {key: value for key, value in config.items() if key != "sparsity_config"}
    groups = library.QuantizationConfig.model_validate(fields).config_groups
    weights, activations = groups["group_0"].weights, groups["group_0"].input_activations
    assert (weights.num_bits, weights.strategy, weights.group_size) == (4, "group", 64)
    assert (weights.type, weights.symmetric, weights.dynamic) == ("int", True, False)
    assert (activations.num_bits, activations.strategy, activations.dynamic) == (8, "token", True)
    assert ("group_1" in groups) == (head is not None)
    if head:
        assert groups["group_1"].targets == ["lm_head"]
        assert groups["group_1"].weights.num_bits == 8


def test_what_is_asked_for_wrongly_is_refused(save_gated: Save, tmp_path: Path) -> None:
    source, out = save_gated(tiny_llama()), tmp_path / "out"
    for values, scale_group in (("int4", 96), ("int8", 64), (None, 64)):
        with pytest.raises(CheckpointError, match="--scale-group .* needs --quantize int4"):
            Quantization.asked(values, scale_group)  # type: ignore[arg-type]
    convert(source, out, quantization=Quantization("int4", scale_group=64))
    check_converted(source, out, quantization=Quantization("int4", scale_group=64))
    with pytest.raises(CheckpointError, match="with --scale-group 64, but 128 is asked for"):
        check_converted(source, out, quantization=Quantization("int4"))
    with pytest.raises(CheckpointError, match="with --quantize int4, but int8 is asked for"):
        check_converted(source, out, quantization=Quantization("int8"))
    with pytest.raises(CheckpointError, match=r"is already quantised \(int4\)"):
        convert(out, tmp_path / "again", quantization=Quantization("int8"))
    with pytest.raises(CheckpointError, match="is compressed already"):
        convert(out, tmp_path / "again")


@pytest.mark.parametrize(
    ("key", "place", "value", "message"),
    [
        (
            f"{DOWN}.weight_scale",
            (5, 1),
            torch.nan,
            f"{DOWN}.weight_scale: scale 1 of row 5 is nan",
        ),
        (f"{DOWN}.weight_scale", (5, 0), -1, "scale 0 of row 5 is -1.0, but .*copy"),
        (f"{UP}.weight_packed", (3, 0), 0, f"{UP}.weight_packed: row 3 holds -8, .* within .*-7"),
        (f"{UP}.bitmask", (3, 0), 0xF5, "row 3, group 1"),
        (f"{UP}.weight_scale", None, None, f"{UP}.weight_scale: none, but a 4-bit row of 32"),
        (f"{UP}.weight_packed", None, None, rf"lacks the values of \['{UP}'\]; .*copy"),
    ],
)
def test_damage_is_named(
    key: str, place: Any, value: Any, message: str, save_gated: Save, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    convert(save_gated(tiny_llama()), out, quantization=Quantization("int4", scale_group=32))
    tensors = all_tensors(out)
    if place is None:
        del tensors[key]
    else:
        tensors[key][place] = value
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    cast = json.loads((out / "cast.json").read_text())
    (out / "cast.json").write_text(json.dumps(cast | {"sha256": {}}))
    with pytest.raises(ValueError, match=message):
        inspect(out)


def test_a_scale_of_another_shape_is_named_before_it_is_loaded(
    save_gated: Save, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    convert(save_gated(tiny_llama()), out, quantization=Quantization("int4", scale_group=32))
    tensors = all_tensors(out)
    tensors[f"{UP}.weight_scale"] = torch.ones(64, 3).bfloat16()
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=rf"{UP}.weight_scale is \[64, 3\], but \[64, 1\]"):
        count_sparse(out)
