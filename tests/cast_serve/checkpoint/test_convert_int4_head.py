"""convert --head int4: what is stored, read back and refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from cast_serve.checkpoint.convert import check_converted, convert
from cast_serve.checkpoint.directory import ModelDirectory
from cast_serve.checkpoint.head import QuantizedHead
from cast_serve.checkpoint.inspect import count_sparse, inspect
from cast_serve.checkpoint.quantization import Quantization
from cast_serve.checkpoint.record import CheckpointError
from cast_serve.sparsity.nibbles import unpack_nibbles
from cast_serve.sparsity.pattern import Pattern
from cast_serve.sparsity.quantize import dequantize_int4, quantize_values_int4
from cast_train.checkpoint.compressed import load_compressed
from tests.cast_serve.checkpoint.test_convert import all_tensors, edit_json
from tests.cast_serve.conftest import Save
from tests.cast_serve.tiny import tiny_gpt2, tiny_llama

EMBEDDING = "model.embed_tokens.weight"
Make = Callable[[], PreTrainedModel]


def tied() -> PreTrainedModel:
    return tiny_llama(128)


def untied() -> PreTrainedModel:
    model = tiny_llama(128)
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(torch.randn(96, 128).bfloat16())
    return model


@pytest.mark.parametrize("scale_group", [128, 64, 32])
@pytest.mark.parametrize("values", ["int8", "int4"])
@pytest.mark.parametrize("make", [tied, untied])
def test_the_head_is_stored_as_pack_quantized(
    make: Make, values: Any, scale_group: int, save_gated: Save, tmp_path: Path
) -> None:
    source, out, twin = save_gated(make()), tmp_path / "out", tmp_path / "twin"
    summary = convert(source, out, twin, quantization=Quantization(values, scale_group, "int4"))
    assert (summary["quantized"], summary["head"]) == (values, "int4")
    assert summary["scale_group"] == (scale_group if values == "int4" else None)
    assert (summary["num_sparse_layers"], summary["num_dense_layers"]) == (14, 1)
    before, after, dense = all_tensors(source), all_tensors(out), all_tensors(twin)
    assert summary["total_weight_bytes"] == sum(tensor.nbytes for tensor in after.values())
    weight = before.get("lm_head.weight", before[EMBEDDING])
    integers, scale = quantize_values_int4(weight, scale_group, has_zeros=True)
    assert "lm_head.weight" not in after
    assert after["lm_head.weight_shape"].tolist() == [96, 128]
    assert torch.equal(unpack_nibbles(after["lm_head.weight_packed"], 128), integers)
    assert torch.equal(after["lm_head.weight_scale"], scale)
    assert torch.equal(after[EMBEDDING], before[EMBEDDING])
    expected = dequantize_int4(integers, scale, scale_group, has_zeros=True)
    assert torch.equal(dense["lm_head.weight"], expected)
    assert not any("weight_" in key for key in dense)
    model = AutoModelForCausalLM.from_pretrained(twin, dtype=torch.bfloat16)
    assert torch.equal(model.lm_head.weight, expected)
    assert torch.equal(load_compressed(out).lm_head.weight, expected)
    assert count_sparse(out) == (14, False)
    directory = ModelDirectory(out)
    assert (directory.head_dtype, directory.quantized) == ("int4", values)
    record = json.loads((out / "cast.json").read_text())["quantization"]
    assert (record["quantize"], record["head"]) == (values, "int4")
    assert record["scale_group"] == scale_group
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is False


@pytest.mark.parametrize("values", ["int8", "int4"])
def test_config_and_words_are_what_compressed_tensors_reads(
    values: Any, save_gated: Save, tmp_path: Path
) -> None:
    convert(save_gated(tied()), tmp_path / "out", quantization=Quantization(values, 64, "int4"))
    config = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    assert config["format"] == ("pack-quantized" if values == "int4" else "int-quantized")
    assert (config["ignore"], config["sparsity_config"]["ignore"]) == ([], ["lm_head"])
    library = pytest.importorskip("compressed_tensors.quantization", reason="with vLLM")
    fields = {key: value for key, value in config.items() if key != "sparsity_config"}
    groups = library.QuantizationConfig.model_validate(fields).config_groups
    assert groups["group_0"].targets == ["Linear"]
    assert groups["group_0"].weights.num_bits == (4 if values == "int4" else 8)
    head = groups["group_1"]
    assert (head.targets, head.format) == (["lm_head"], "pack-quantized")
    weights = head.weights
    assert (weights.num_bits, weights.strategy, weights.group_size) == (4, "group", 64)
    assert (weights.type, weights.symmetric, weights.dynamic) == ("int", True, False)

    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

    tensors = all_tensors(tmp_path / "out")
    shape = torch.Size(tensors["lm_head.weight_shape"].tolist())
    integers = unpack_from_int32(tensors["lm_head.weight_packed"], 4, shape)
    weight = integers.float() * tensors["lm_head.weight_scale"].float().repeat_interleave(64, 1)
    head_parts = {key.partition(".")[2]: t for key, t in tensors.items() if "lm_head" in key}
    assert torch.equal(weight, QuantizedHead.from_parts("lm_head", head_parts).dense(torch.float32))


@pytest.mark.parametrize("pattern", [Pattern(2, 4), Pattern(40, 64)], ids=str)
def test_every_kind_of_source_gives_the_same_tensors(
    pattern: Pattern, save_gated: Save, tmp_path: Path
) -> None:
    gated = save_gated(untied(), pattern)
    convert(gated, tmp_path / "compressed", tmp_path / "pruned")
    found = {}
    for name in ("gated", "pruned", "compressed"):
        asked = Quantization("int4", 64, "int4")
        convert(tmp_path / name, tmp_path / f"{name}4", quantization=asked)
        found[name] = all_tensors(tmp_path / f"{name}4")
    for name in ("pruned", "compressed"):
        assert found[name].keys() == found["gated"].keys()
        assert all(torch.equal(found[name][key], found["gated"][key]) for key in found[name])


@pytest.mark.parametrize(
    ("make", "scale_group", "message"),
    [
        (tiny_llama, 32, "lm_head: the hidden size 32 is not a multiple of 64, .*--head int8"),
        (tiny_gpt2, 32, "lm_head: the hidden size 32 is not a multiple of 64"),
        (lambda: tiny_llama(192), 128, "192 is not a multiple of --scale-group 128.*group 64, or"),
    ],
)
def test_a_hidden_size_without_whole_scale_groups_is_refused(
    make: Make, scale_group: int, message: str, save_gated: Save, tmp_path: Path
) -> None:
    asked = Quantization("int4", scale_group, "int4")
    with pytest.raises(CheckpointError, match=message):
        convert(save_gated(make()), tmp_path / "out", quantization=asked)
    assert not (tmp_path / "out").exists()


def test_options_that_do_not_go_together() -> None:
    with pytest.raises(CheckpointError, match="--head int4 needs --quantize int8 or int4"):
        Quantization.asked(None, head="int4")
    with pytest.raises(CheckpointError, match="--scale-group 64 .*needs --quantize int4 or --head"):
        Quantization.asked("int8", 64, "int8")
    assert Quantization.asked("int8", 64, "int4") == Quantization("int8", 64, "int4")
    assert Quantization("int8", 64, "int4").group is None


def test_another_head_than_was_asked_for_is_named(save_gated: Save, tmp_path: Path) -> None:
    source, out = save_gated(tied()), tmp_path / "out"
    convert(source, out, quantization=Quantization("int8", 64, "int4"))
    check_converted(source, out, Quantization("int8", 64, "int4"))
    for head in ("int8", "auto"):
        with pytest.raises(CheckpointError, match="with --head int4, but int8 is asked for"):
            check_converted(source, out, Quantization("int8", head=head))
    with pytest.raises(CheckpointError, match="with --scale-group 64, but 128 is asked for"):
        check_converted(source, out, Quantization("int8", head="int4"))


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("weight_shape", lambda t: None, r"lm_head.weight_packed is .* with weight_shape \[\]"),
        ("weight_shape", lambda t: t * 2, r"with weight_shape \[192, 256\]"),
        ("weight_packed", lambda t: t[:, :-1].contiguous(), r"int32 \[96, 15\] with"),
        ("weight_packed", lambda t: t.long(), "weight_packed is torch.int64"),
        ("weight_packed", lambda t: t * 0, "weight_packed: row 0 holds -8, .* within .-7; 96 rows"),
        ("weight_scale", lambda t: None, "lm_head.weight_scale: none, but a 4-bit output"),
        ("weight_scale", lambda t: t.repeat(1, 3), r"weight_scale: \[96, 6\], but a 4-bit"),
        ("weight_scale", lambda t: t[1:].clone(), r"weight_scale is .* \[95, 2\]"),
        ("weight_scale", lambda t: -t, "lm_head.weight_scale: scale 0 of row 0 is -"),
    ],
)
def test_damage_is_named(
    part: str,
    change: Callable[[Tensor], Tensor | None],
    message: str,
    save_gated: Save,
    tmp_path: Path,
) -> None:
    out = tmp_path / "out"
    convert(save_gated(tied()), out, quantization=Quantization("int8", 64, "int4"))
    tensors = load_file(out / "model.safetensors")
    changed = change(tensors.pop(f"lm_head.{part}"))
    if changed is not None:
        tensors[f"lm_head.{part}"] = changed
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    edit_json(out / "cast.json", sha256={})
    with pytest.raises(CheckpointError, match=message):
        inspect(out)
