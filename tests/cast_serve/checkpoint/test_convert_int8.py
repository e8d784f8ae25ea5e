"""convert --quantize int8: every kind of source, and the output layer."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, OPTConfig, OPTForCausalLM, PreTrainedModel

from cast_serve.checkpoint.convert import check_converted, convert
from cast_serve.checkpoint.quantization import Quantization
from cast_serve.checkpoint.record import CheckpointError
from cast_serve.sparsity.bitmask import compress, decompress
from cast_serve.sparsity.pattern import hard_mask
from cast_serve.sparsity.quantize import SCALES_CHOSEN, dequantize, quantize_rows
from tests.cast_serve.checkpoint.test_convert import all_tensors, edit_json
from tests.cast_serve.conftest import Save
from tests.cast_serve.tiny import tiny_llama

EMBEDDING = "model.embed_tokens"


def untied_llama() -> PreTrainedModel:
    model = tiny_llama()
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(torch.randn(96, 32).bfloat16())
    return model


def test_values_are_those_of_the_hardened_rows(save_gated: Save, tmp_path: Path) -> None:
    source, out = save_gated(tiny_llama()), tmp_path / "out"
    summary = convert(source, out, quantization=Quantization("int8"))
    assert (summary["kind"], summary["quantized"], summary["head"]) == ("compressed", "int8", None)
    before, after = all_tensors(source), all_tensors(out)
    cast = json.loads((out / "cast.json").read_text())
    assert len(cast["targets"]) == 14
    for name in cast["targets"]:
        weight = before[f"{name}.weight"] * hard_mask(before[f"{name}.gate"])
        expected, expected_scale = quantize_rows(weight)
        assert after[f"{name}.compressed"].dtype == torch.int8
        assert torch.equal(after[f"{name}.weight_scale"], expected_scale)
        assert torch.equal(after[f"{name}.bitmask"], compress(weight)[1])
        found = decompress(
            after[f"{name}.compressed"], after[f"{name}.bitmask"], weight.shape[1], name
        )
        assert torch.equal(found, expected)
    assert torch.equal(after[f"{EMBEDDING}.weight"], before[f"{EMBEDDING}.weight"])
    assert cast["quantization"] == {"quantize": "int8", "head": None, "scales": SCALES_CHOSEN}


def test_a_quality_found_before_is_not_taken_for_that_of_int8(
    save_gated: Save, tmp_path: Path
) -> None:
    source = save_gated(tiny_llama(), quality={"perplexity_hard": 2})
    assert convert(source, tmp_path / "bf16")["quality"] == {"perplexity_hard": 2}
    summary = convert(source, tmp_path / "out", quantization=Quantization("int8"))
    assert summary["quality"] is None
    assert summary["quality_before_quantizing"] == {"perplexity_hard": 2}
    cast = json.loads((tmp_path / "out/cast.json").read_text())
    assert cast["quality"] == {"perplexity_hard": 2}  # what training wrote stays


def test_a_kept_weight_that_becomes_zero_stays_kept(save_pruned: Save, tmp_path: Path) -> None:
    source, name = save_pruned(tiny_llama()), "model.layers.0.mlp.up_proj"
    tensors = all_tensors(source)
    tensors[f"{name}.weight"][0] = 0
    tensors[f"{name}.weight"][0, 2:4] = torch.tensor([1e-6, 1.0])
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    convert(source, tmp_path / "out", quantization=Quantization("int8"))
    after = all_tensors(tmp_path / "out")
    assert after[f"{name}.compressed"][0, :2].tolist() == [0, 127]
    assert after[f"{name}.bitmask"][0, 0] & 0xF == 0b1100


@pytest.mark.parametrize("head", [None, "int8"])
def test_every_kind_of_source_gives_the_same_tensors(
    head: None, save_gated: Save, tmp_path: Path
) -> None:
    gated = save_gated(untied_llama())
    convert(gated, tmp_path / "compressed", tmp_path / "pruned")
    found = {}
    for name in ("gated", "pruned", "compressed"):
        convert(
            tmp_path / name, tmp_path / f"{name}8", quantization=Quantization("int8", head=head)
        )
        found[name] = all_tensors(tmp_path / f"{name}8")
    assert any(tensor.dtype == torch.int8 for tensor in found["gated"].values())
    for name in ("pruned", "compressed"):
        assert found[name].keys() == found["gated"].keys()
        assert all(torch.equal(found[name][key], found["gated"][key]) for key in found[name])
    configs = [(tmp_path / f"{n}8/config.json").read_text() for n in ("gated", "compressed")]
    assert json.loads(configs[0]) == json.loads(configs[1])


def test_config_is_what_compressed_tensors_writes(save_gated: Save, tmp_path: Path) -> None:
    source = save_gated(tiny_llama())
    for head, ignore in ((None, ["lm_head"]), ("int8", [])):
        out = tmp_path / f"out-{head}"
        convert(source, out, quantization=Quantization("int8", head=head))  # type: ignore[arg-type]
        quantization = json.loads((out / "config.json").read_text())["quantization_config"]
        assert quantization["quant_method"] == "compressed-tensors"
        assert quantization["format"] == "int-quantized"
        assert quantization["quantization_status"] == "compressed"
        assert quantization["ignore"] == ignore
        assert quantization["sparsity_config"]["format"] == "sparse-24-bitmask"
        assert quantization["sparsity_config"]["ignore"] == ["lm_head"]
        library = pytest.importorskip("compressed_tensors.quantization", reason="with vLLM")
        fields = {key: value for key, value in quantization.items() if key != "sparsity_config"}
        group = library.QuantizationConfig.model_validate(fields).config_groups["group_0"]
        assert group.targets == ["Linear"]
        weights, activations = group.weights, group.input_activations
        assert (weights.num_bits, weights.type, weights.symmetric) == (8, "int", True)
        assert (weights.strategy, weights.dynamic) == ("channel", False)
        assert (activations.num_bits, activations.type, activations.symmetric) == (8, "int", True)
        assert (activations.strategy, activations.dynamic) == ("token", True)


def assert_head_is(tensors: dict[str, Tensor], weight: Tensor) -> None:
    values, scale = quantize_rows(weight)
    assert torch.equal(tensors["lm_head.weight"], values)
    assert torch.equal(tensors["lm_head.weight_scale"], scale)


def test_a_tied_head_is_written_as_a_copy(save_gated: Save, tmp_path: Path) -> None:
    source, out = save_gated(tiny_llama()), tmp_path / "out"
    assert json.loads((source / "config.json").read_text())["tie_word_embeddings"] is True
    assert convert(source, out, quantization=Quantization("int8", head="int8"))["head"] == "int8"
    before, after = all_tensors(source), all_tensors(out)
    assert "lm_head.weight" not in before
    assert_head_is(after, before[f"{EMBEDDING}.weight"])
    assert torch.equal(after[f"{EMBEDDING}.weight"], before[f"{EMBEDDING}.weight"])
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is False


def test_an_untied_head_is_replaced(save_gated: Save, tmp_path: Path) -> None:
    source, out = save_gated(untied_llama()), tmp_path / "out"
    convert(source, out, quantization=Quantization("int8", head="int8"))
    before, after = all_tensors(source), all_tensors(out)
    assert_head_is(after, before["lm_head.weight"])
    assert torch.equal(after[f"{EMBEDDING}.weight"], before[f"{EMBEDDING}.weight"])


@pytest.mark.parametrize("make", [tiny_llama, untied_llama])
def test_the_dense_twin_is_the_dequantised_model(
    make: Callable[[], PreTrainedModel], save_pruned: Save, tmp_path: Path
) -> None:
    source, twin = save_pruned(make(), max_shard_size="20KB"), tmp_path / "twin"
    convert(source, tmp_path / "out", twin, quantization=Quantization("int8", head="int8"))
    before, after = all_tensors(source), all_tensors(twin)
    cast = json.loads((twin / "cast.json").read_text())
    assert cast["kind"] == "pruned"
    for name in cast["targets"]:
        expected = dequantize(*quantize_rows(before[f"{name}.weight"]))
        assert torch.equal(after[f"{name}.weight"], expected)
    head = before.get("lm_head.weight", before[f"{EMBEDDING}.weight"])
    assert torch.equal(after["lm_head.weight"], dequantize(*quantize_rows(head)))
    assert torch.equal(after[f"{EMBEDDING}.weight"], before[f"{EMBEDDING}.weight"])
    settings = json.loads((twin / "config.json").read_text())
    assert settings["tie_word_embeddings"] is False
    assert "quantization_config" not in settings
    model = AutoModelForCausalLM.from_pretrained(twin, dtype=torch.bfloat16)
    assert torch.equal(model.lm_head.weight, after["lm_head.weight"])


def test_a_twin_of_a_compressed_source_is_no_longer_quantised(
    save_gated: Save, tmp_path: Path
) -> None:
    convert(save_gated(tiny_llama()), tmp_path / "bf16")
    convert(
        tmp_path / "bf16", tmp_path / "out", tmp_path / "twin", quantization=Quantization("int8")
    )
    settings = json.loads((tmp_path / "twin/config.json").read_text())
    assert "quantization_config" not in settings
    assert settings["tie_word_embeddings"] is True
    # The twin is an ordinary 2:4 directory: converted without --quantize it is not quantised.
    convert(tmp_path / "twin", tmp_path / "again")
    assert json.loads((tmp_path / "again/cast.json").read_text())["quantization"] is None


def test_refuses_what_is_quantised_or_compressed_already(save_gated: Save, tmp_path: Path) -> None:
    convert(save_gated(tiny_llama()), tmp_path / "out", quantization=Quantization("int8"))
    with pytest.raises(CheckpointError, match=r"is already quantised \(int8\); for --quantize"):
        convert(tmp_path / "out", tmp_path / "again", quantization=Quantization("int8"))
    with pytest.raises(CheckpointError, match="is compressed already"):
        convert(tmp_path / "out", tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_a_head_that_vllm_has_not_in_8_bits_stays_as_it_is(
    save_pruned: Save, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = OPTConfig(vocab_size=96, hidden_size=32, ffn_dim=64, num_hidden_layers=1)
    config.num_attention_heads, config.word_embed_proj_dim = 4, 32
    source = save_pruned(OPTForCausalLM(config).bfloat16())
    with pytest.raises(CheckpointError, match="no int8 output layer for OPTForCausalLM; .*none"):
        convert(source, tmp_path / "out", quantization=Quantization("int8", head="int8"))
    chosen = convert(source, tmp_path / "chosen", quantization=Quantization("int8", head="auto"))
    assert chosen["head"] is None
    assert "vLLM has no int8 output layer for OPTForCausalLM; it stays" in caplog.text
    assert convert(source, tmp_path / "out", quantization=Quantization("int8"))["head"] is None


def test_refuses_a_head_alone() -> None:
    with pytest.raises(CheckpointError, match="--head int8 needs --quantize int8"):
        Quantization.asked(None, head="int8")


def test_refuses_a_head_that_is_a_target(save_pruned: Save, tmp_path: Path) -> None:
    model = untied_llama()
    model.lm_head.weight.data *= hard_mask(model.lm_head.weight.data.float().abs())
    source = save_pruned(model)
    record = {"format_version": 1, "kind": "pruned", "n": 2, "m": 4, "targets": ["lm_head"]}
    (source / "cast.json").write_text(json.dumps(record))
    with pytest.raises(CheckpointError, match="has lm_head among its targets; give --head none"):
        convert(source, tmp_path / "out", quantization=Quantization("int8", head="int8"))


@pytest.mark.parametrize("name", ["model.layers.0.mlp.up_proj", EMBEDDING])
def test_refuses_weights_that_are_not_finite(name: str, save_pruned: Save, tmp_path: Path) -> None:
    source = save_pruned(tiny_llama())
    tensors = all_tensors(source)
    column = int(tensors[f"{name}.weight"][3].float().abs().argmax())  # a kept one
    tensors[f"{name}.weight"][3, column] = torch.inf
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=f"{name}.*: row 3 holds Inf or NaN"):
        convert(source, tmp_path / "out", quantization=Quantization("int8", head="int8"))
    assert not (tmp_path / "out").exists()


def test_refuses_a_tied_head_without_an_embedding(save_pruned: Save, tmp_path: Path) -> None:
    source = save_pruned(tiny_llama())
    tensors = all_tensors(source)
    del tensors[f"{EMBEDDING}.weight"]
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="no tensor model.embed_tokens.weight"):
        convert(source, tmp_path / "out", quantization=Quantization("int8", head="int8"))


def test_an_output_of_other_settings_is_named(save_gated: Save, tmp_path: Path) -> None:
    source, out = save_gated(tiny_llama()), tmp_path / "out"
    convert(source, out, quantization=Quantization("int8"))
    check_converted(source, out, quantization=Quantization("int8"))
    with pytest.raises(CheckpointError, match="with --quantize int8, but none is asked for"):
        check_converted(source, out)
    with pytest.raises(CheckpointError, match="with --head none, but int8 is asked for; remove"):
        check_converted(source, out, quantization=Quantization("int8", head="int8"))
    edit_json(out / "cast.json", quantization=None)
    with pytest.raises(CheckpointError, match="with --quantize none, but int8 is asked for"):
        check_converted(source, out, quantization=Quantization("int8"))
