"""Patterns of N of 64: written, read, and refused where files do not belong together."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from cast_serve.checkpoint.convert import check_converted, convert
from cast_serve.checkpoint.directory import ModelDirectory
from cast_serve.checkpoint.inspect import count_sparse, inspect
from cast_serve.checkpoint.linear import CompressedLinear
from cast_serve.checkpoint.quantization import Quantization
from cast_serve.checkpoint.record import CheckpointError
from cast_serve.model import load
from cast_serve.sparsity.bitmask import unpack_bits
from cast_serve.sparsity.pattern import Pattern, PatternError, hard_mask
from cast_serve.sparsity.quantize import dequantize, dequantize_int4, quantize_values_int4
from cast_train.checkpoint.compressed import load_compressed
from tests.cast_serve.checkpoint.test_convert import all_tensors, edit_json
from tests.cast_serve.conftest import Save
from tests.cast_serve.tiny import tiny_gpt2, tiny_llama

UP = "model.layers.1.mlp.up_proj"
TOKENS = torch.arange(12)[None]
PATTERNS = [Pattern(32, 64), Pattern(16, 32), Pattern(40, 64)]
WIDE = Pattern(40, 64)


@pytest.fixture
def wide_dir(save_pruned: Save, tmp_path: Path) -> Path:
    """A compressed directory of 40:64 in bf16."""
    convert(save_pruned(tiny_llama(64), pattern=WIDE, is_on_record=True), tmp_path / "wide")
    return tmp_path / "wide"


def replace_tensors(folder: Path, **tensors: Tensor | None) -> None:
    """Tensors by the last word of UP's; None: it is left out."""
    file = folder / "model.safetensors"
    found = {**load_file(file), **{f"{UP}.{part}": tensor for part, tensor in tensors.items()}}
    save_file({k: t for k, t in found.items() if t is not None}, file, metadata={"format": "pt"})
    edit_json(folder / "cast.json", sha256={})


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_gated_becomes_words_of_64(pattern: Pattern, save_gated: Save, tmp_path: Path) -> None:
    source = save_gated(tiny_llama(64), pattern)
    summary = convert(source, tmp_path / "out", tmp_path / "twin")
    stored = pattern.stored
    assert (summary["kind"], summary["pattern"]) == ("compressed", str(pattern))
    assert summary["num_sparse_layers"] == 14
    assert summary["zeros"] == pattern.zeros
    assert summary["bits_per_weight"] == 16 * stored.n / 64 + 1
    before, after = all_tensors(source), all_tensors(tmp_path / "out")
    for name in json.loads((source / "cast.json").read_text())["targets"]:
        weight = before[f"{name}.weight"]
        bitmask = after[f"{name}.bitmask"]
        assert after[f"{name}.compressed"].shape == (len(weight), weight.shape[1] * stored.n // 64)
        mask = unpack_bits(bitmask, weight.shape[1])
        assert (mask.unflatten(1, (-1, 64)).sum(-1) == stored.n).all()
        expected = weight * hard_mask(before[f"{name}.gate"], pattern)
        assert torch.equal(ModelDirectory(tmp_path / "out").target(name).dense(), expected)
        assert torch.equal(all_tensors(tmp_path / "twin")[f"{name}.weight"], expected)
    sparsity = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"][
        "sparsity_config"
    ]
    assert (sparsity["format"], sparsity["sparsity_structure"]) == (
        "sparse-64-bitmask",
        str(stored),
    )
    assert sparsity["global_sparsity"] == pattern.zeros
    record = json.loads((tmp_path / "out/cast.json").read_text())
    assert (record["n"], record["m"]) == (pattern.n, pattern.m)
    assert count_sparse(tmp_path / "out") == (14, False)
    card = (tmp_path / "out/README.md").read_text()
    assert f"# A {pattern}-sparse language model" in card
    assert (
        f"{pattern.m - pattern.n} of every {pattern.m} consecutive weights along in_features are"
        in card
    )
    check_converted(source, tmp_path / "out")


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("scale_group", [None, 32, 64, 128])
def test_quantised_kept_values(
    pattern: Pattern, scale_group: int | None, save_pruned: Save, tmp_path: Path
) -> None:
    """8 and 4 bits of the dense weight's columns: zeros change no scale."""
    source = save_pruned(tiny_llama(64), pattern=pattern, is_on_record=True)
    values: Literal["int8", "int4"] = "int8" if scale_group is None else "int4"
    asked = Quantization(values, scale_group or 128, head="int8")
    summary = convert(source, tmp_path / "out", tmp_path / "twin", quantization=asked)
    assert (summary["quantized"], summary["head"]) == (values, "int8")
    assert summary["scale_group"] == scale_group
    assert count_sparse(tmp_path / "out") == (14, False)
    convert(source, tmp_path / "bf16")
    convert(tmp_path / "bf16", tmp_path / "again", quantization=asked)
    out, again = all_tensors(tmp_path / "out"), all_tensors(tmp_path / "again")
    assert all(torch.equal(out[key], again[key]) for key in out)
    twin, dense = all_tensors(tmp_path / "twin"), all_tensors(source)
    for name in ModelDirectory(tmp_path / "out").targets:
        linear = ModelDirectory(tmp_path / "out").target(name)
        assert linear.pattern == pattern.stored
        weight, scale = dense[f"{name}.weight"], linear.scale
        assert scale is not None
        assert torch.equal(linear.dense(), twin[f"{name}.weight"])
        assert not linear.dense()[~linear.mask].any()
        if scale_group is None:
            integers = (weight.float() / scale.float()).round().clamp(-127, 127).to(torch.int8)
            expected = dequantize(integers, scale)
        else:
            integers, expected_scale = quantize_values_int4(weight, scale_group, has_zeros=True)
            assert torch.equal(scale, expected_scale)
            expected = dequantize_int4(integers, scale, scale_group, has_zeros=True)
        assert torch.equal(linear.dense(), expected)


@pytest.mark.parametrize("values", [None, "int8", "int4"])
def test_transformers_computes_the_twin(values: Any, save_pruned: Save, tmp_path: Path) -> None:
    source = save_pruned(tiny_llama(64), pattern=WIDE, is_on_record=True)
    convert(
        source,
        tmp_path / "out",
        tmp_path / "twin",
        quantization=Quantization.asked(values, head="none" if values else None),
    )
    twin = AutoModelForCausalLM.from_pretrained(tmp_path / "twin", dtype=torch.float32)
    wanted = twin(TOKENS).logits.detach()
    for model in (load(tmp_path / "out", torch.float32), load_compressed(tmp_path / "out")):
        found = model.float()(TOKENS).logits.detach()
        error = float((found - wanted).norm() / wanted.norm())
        assert error < (1e-6 if values is None else 1e-2)
        assert (error > 1e-6) == (values is not None)  # activations are rounded


def test_gpt2_and_trained_scales(save_gated: Save, tmp_path: Path) -> None:
    model = tiny_gpt2(64)
    source = save_gated(model, WIDE)
    convert(source, tmp_path / "out", tmp_path / "twin")
    name = "transformer.h.0.attn.c_attn"
    stored = ModelDirectory(tmp_path / "out").target(name)
    twin = all_tensors(tmp_path / "twin")[f"{name}.weight"]
    assert torch.equal(stored.dense().T, twin)
    found, wanted = (
        read(TOKENS).logits
        for read in (
            load(tmp_path / "out", torch.float32),
            AutoModelForCausalLM.from_pretrained(tmp_path / "twin", dtype=torch.float32),
        )
    )
    torch.testing.assert_close(found, wanted)
    quantized = stored.quantize(Quantization("int4", 32))
    assert quantized.scale is not None
    again = stored.with_scale(quantized.scale, 32)
    assert torch.equal(again.values, quantized.values)


def test_one_n_for_each_linear(wide_dir: Path, tmp_path: Path) -> None:
    """As a budget gives it: named in both files, checked against both."""
    weight = ModelDirectory(wide_dir).target(UP).dense()
    few = CompressedLinear.from_weight(UP, weight * hard_mask(weight.abs(), Pattern(20, 64)), WIDE)
    few = CompressedLinear.from_weight(UP, few.dense(), Pattern(20, 64))
    parts = {key.rpartition(".")[2]: tensor for key, tensor in few.tensors().items()}
    replace_tensors(wide_dir, **parts)
    with pytest.raises(
        PatternError, match=f"{UP}: compressed .* in 40:64, the structure in config"
    ):
        inspect(wide_dir)
    edit_json(wide_dir / "cast.json", kept_of_64={UP: 20})
    with pytest.raises(CheckpointError, match=r"but config.json says 40:64, or another kept_of_64"):
        inspect(wide_dir)
    edit_sparsity(wide_dir, kept_of_64={UP: 20})
    summary = inspect(wide_dir)
    assert summary["pattern"] == "20-40:64"
    assert summary["zeros"] == 0.4097  # 20 of 64 of one ninth of the weights
    assert torch.equal(ModelDirectory(wide_dir).target(UP).dense(), few.dense())
    load(wide_dir)
    load_compressed(wide_dir)
    summary = convert(wide_dir, tmp_path / "int8", quantization=Quantization("int8"))
    assert summary["pattern"] == "20-40:64"
    assert inspect(tmp_path / "int8") == summary
    card = (tmp_path / "int8/README.md").read_text()
    assert "# A 20-40:64-sparse language model" in card
    assert "A linear keeps 20 to 40 of every 64 consecutive weights along in_features" in card


def edit_sparsity(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    config["sparsity_config"] |= changes
    edit_json(folder / "config.json", quantization_config=config)


def one_bit_more(folder: Path) -> None:
    bitmask = all_tensors(folder)[f"{UP}.bitmask"]
    byte = int((bitmask[2] != 255).nonzero()[0])
    bitmask[2, byte] |= int(bitmask[2, byte]) + 1
    replace_tensors(folder, bitmask=bitmask)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (one_bit_more, f"{UP}: 1 words of the bitmask .* 40 of 64 .* row 2, word 0, with 41"),
        (
            lambda folder: edit_sparsity(folder, sparsity_structure="32:64"),
            "cast.json says 40:64, .* but config.json says 32:64",
        ),
        (
            lambda folder: edit_sparsity(folder, sparsity_structure="0:64"),
            "config.json: sparsity_structure: sparsity '0:64' is not N:M",
        ),
        (
            lambda folder: edit_sparsity(folder, sparsity_structure="16:32"),
            "16:32, but the format sparse-64-bitmask stores N:64",
        ),
        (
            lambda folder: edit_sparsity(folder, format="sparse-24-bitmask"),
            "sparsity_structure is '40:64', but the format sparse-24-bitmask stores 2:4",
        ),
        (
            lambda folder: edit_sparsity(folder, kept_of_64={UP: 0}),
            "kept_of_64 is .*: 0}, but has a number from 1 to 63",
        ),
        (
            lambda folder: replace_tensors(folder, shape=torch.tensor([[128], [96]])),
            f"{UP}: in_features 96 is not a multiple of 64, which 40:64, the structure",
        ),
        (
            lambda folder: replace_tensors(folder, compressed=torch.ones(128, 32)),
            "in 40:64, the st",
        ),
        (lambda folder: replace_tensors(folder, bitmask=None), f"{UP} lacks bitmask"),
        (lambda folder: replace_tensors(folder, compressed=None), f"lacks the values of .*{UP}"),
    ],
)
def test_what_does_not_belong_together_is_named(
    damage: Callable[[Path], None], message: str, wide_dir: Path
) -> None:
    damage(wide_dir)
    with pytest.raises((CheckpointError, PatternError), match=message):
        inspect(wide_dir)
    with pytest.raises((CheckpointError, PatternError)):
        load(wide_dir)


def test_the_pattern_of_a_directory_that_does_not_say_it(save_pruned: Save, tmp_path: Path) -> None:
    source = save_pruned(tiny_llama(64), pattern=Pattern(16, 32))
    with pytest.raises(PatternError, match="do not have at most 2 non-zeros"):
        convert(source, tmp_path / "out")
    summary = convert(source, tmp_path / "out", pattern=Pattern(16, 32))
    assert (summary["pattern"], summary["bits_per_weight"]) == ("16:32", 9.0)
    check_converted(source, tmp_path / "out", pattern=Pattern(16, 32))
    with pytest.raises(CheckpointError, match="is not 32:64, as --sparsity asks for; remove"):
        check_converted(source, tmp_path / "out", pattern=Pattern(32, 64))
    asked = Quantization("int8")
    convert(tmp_path / "out", tmp_path / "int8", quantization=asked, pattern=Pattern(16, 32))
    with pytest.raises(CheckpointError, match="is 16:32 by its cast.json .* --sparsity is 2:4; l"):
        convert(tmp_path / "out", tmp_path / "2", quantization=asked, pattern=Pattern(2, 4))


def test_other_weights_than_the_record_s_are_not_pruned(save_pruned: Save, tmp_path: Path) -> None:
    source = save_pruned(tiny_llama(64), pattern=WIDE, is_on_record=True)
    edit_json(source / "cast.json", n=36)
    with pytest.raises(PatternError, match="do not have at most 36 non-zeros; the first is row 0"):
        convert(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()
