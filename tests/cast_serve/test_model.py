"""A compressed directory in transformers, against the dense twin that `convert` writes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PhiConfig, PhiForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from cast_serve.checkpoint.convert import convert
from cast_serve.checkpoint.directory import ModelDirectory
from cast_serve.checkpoint.head import QuantizedHead
from cast_serve.checkpoint.linear import CompressedLinear
from cast_serve.checkpoint.quantization import Quantization
from cast_serve.checkpoint.record import CheckpointError
from cast_serve.model import IntegerHead, SparseLinear, load
from cast_serve.sparsity.quantize import rounded
from tests.cast_serve.conftest import Save
from tests.cast_serve.tiny import tiny_gpt2, tiny_llama
from tests.fake_hub import FakeHub

Make = Callable[[], PreTrainedModel]
MODELS = pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
TOKENS = torch.arange(24).view(2, 12)


def with_biases(model: PreTrainedModel) -> PreTrainedModel:
    """The same, its biases no longer 0."""
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data.normal_(std=0.1)
    return model


def assert_products_are_those_of_the_twin(folder: Path, twin: PreTrainedModel) -> None:
    """Layer by layer, where a wrong scale shows; x is rounded as the kernels round it."""
    model, source = load(folder, torch.float32), ModelDirectory(folder)
    products: dict[str, tuple[Tensor, Tensor]] = {}

    def remember(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
            products[name] = inputs[0].clone(), output.clone()

        return hook

    for name, module in model.named_modules():
        if isinstance(module, SparseLinear | IntegerHead):
            module.register_forward_hook(remember(name))
    model(TOKENS)
    assert products.keys() == {*source.targets, *([source.head] if source.head_dtype else [])}
    for name, (x, y) in products.items():
        parts = source.parts(name)
        if name in source.targets:
            weight = CompressedLinear.from_parts(name, parts).dense(torch.float32)
        else:
            weight = QuantizedHead.from_parts(name, parts).dense(torch.float32)
        layer = twin.get_submodule(name)
        of_twin = layer.weight.T if isinstance(layer, Conv1D) else layer.weight
        assert torch.equal(of_twin, weight.bfloat16().float()), name
        expected = nn.functional.linear(rounded(x), weight, layer.bias)
        assert (y - expected).norm() / expected.norm() < 1e-5, name


def test_weights_of_one_dtype_multiply_no_other(save_gated: Save, tmp_path: Path) -> None:
    convert(save_gated(tiny_llama()), tmp_path / "out")
    with pytest.raises(ValueError, match=r"packed in torch.bfloat16 .*load\(DIR, dtype=torch.fl"):
        load(tmp_path / "out").half()(TOKENS)


def test_integers_multiply_any_dtype(save_gated: Save, tmp_path: Path) -> None:
    convert(
        save_gated(tiny_llama()), tmp_path / "out", quantization=Quantization("int8", head="int8")
    )
    logits = load(tmp_path / "out", torch.float32).to(torch.bfloat16)(TOKENS).logits
    expected = load(tmp_path / "out", torch.bfloat16)(TOKENS).logits
    torch.testing.assert_close(logits, expected, rtol=0.05, atol=0.05)


@MODELS
def test_logits_are_those_of_the_dense_twin(make: Make, save_gated: Save, tmp_path: Path) -> None:
    convert(save_gated(make()), tmp_path / "out", tmp_path / "twin")
    model = load(tmp_path / "out", torch.float32)
    twin = AutoModelForCausalLM.from_pretrained(tmp_path / "twin", dtype=torch.float32)
    linears = [module for module in model.modules() if isinstance(module, SparseLinear)]
    assert len(linears) >= 4
    torch.testing.assert_close(model(TOKENS).logits, twin(TOKENS).logits, rtol=1e-5, atol=1e-5)
    words = {"max_new_tokens": 8, "do_sample": False}
    assert torch.equal(model.generate(TOKENS, **words), twin.generate(TOKENS, **words))


@MODELS
def test_int8_and_its_head(make: Make, save_gated: Save, tmp_path: Path) -> None:
    """The twin's activations are not rounded, so the two are close and not equal."""
    convert(
        *(save_gated(with_biases(make())), tmp_path / "out", tmp_path / "twin"),
        quantization=Quantization("int8", head="int8"),
    )
    model = load(tmp_path / "out")
    assert isinstance(model.get_output_embeddings(), IntegerHead)
    twin = AutoModelForCausalLM.from_pretrained(tmp_path / "twin", dtype=torch.float32)
    found, wanted = model(TOKENS).logits.float(), twin(TOKENS).logits
    assert 0 < (found - wanted).norm() / wanted.norm() < 3e-2
    assert_products_are_those_of_the_twin(tmp_path / "out", twin)


def test_an_int8_head_keeps_its_bias(save_gated: Save, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = PhiConfig(
        **{"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 96},
        num_attention_heads=2,
    )
    phi = PhiForCausalLM(config).bfloat16()
    phi.lm_head.bias.data = torch.randn(96).bfloat16()
    convert(save_gated(phi), tmp_path / "out", quantization=Quantization("int8", head="int8"))
    head = load(tmp_path / "out").get_output_embeddings()
    assert isinstance(head, IntegerHead)
    x = torch.zeros(1, 32).bfloat16()
    assert torch.equal(head(x), phi.lm_head.bias.unsqueeze(0))


def test_generation_settings_are_those_of_the_directory(save_gated: Save, tmp_path: Path) -> None:
    source = save_gated(tiny_llama())
    (source / "generation_config.json").write_text('{"eos_token_id": [5, 7]}')
    convert(source, tmp_path / "out")
    assert load(tmp_path / "out").generation_config.eos_token_id == [5, 7]


@MODELS
@pytest.mark.parametrize("scale_group", [128, 32])
def test_int4(make: Make, scale_group: int, save_gated: Save, tmp_path: Path) -> None:
    convert(
        *(save_gated(with_biases(make())), tmp_path / "out", tmp_path / "twin"),
        quantization=Quantization("int4", scale_group=scale_group),
    )
    model = load(tmp_path / "out")
    linears = [module for module in model.modules() if isinstance(module, SparseLinear)]
    assert {linear.scale_group for linear in linears} <= {128, scale_group}
    assert "int4" in repr(linears[0])
    twin = AutoModelForCausalLM.from_pretrained(tmp_path / "twin", dtype=torch.float32)
    found, wanted = model(TOKENS).logits.float(), twin(TOKENS).logits
    assert 0 < (found - wanted).norm() / wanted.norm() < 3e-2
    assert_products_are_those_of_the_twin(tmp_path / "out", twin)


@pytest.mark.parametrize("values", ["int8", "int4"])
def test_a_head_of_4_bits(values: Any, save_gated: Save, tmp_path: Path) -> None:
    convert(
        *(save_gated(tiny_llama(64)), tmp_path / "out", tmp_path / "twin"),
        quantization=Quantization(values, 32, "int4"),
    )
    head = load(tmp_path / "out").get_output_embeddings()
    assert isinstance(head, IntegerHead)
    assert head.packed.nbytes == 96 * 64 * (4 / 8 + 2 / 32) * 2  # half a tile's columns
    twin = AutoModelForCausalLM.from_pretrained(tmp_path / "twin", dtype=torch.float32)
    assert_products_are_those_of_the_twin(tmp_path / "out", twin)


def test_what_is_not_compressed_or_damaged_is_refused(save_gated: Save, tmp_path: Path) -> None:
    source = save_gated(tiny_llama())
    with pytest.raises(CheckpointError, match="is gated; convert it first"):
        load(source)
    convert(source, tmp_path / "out")
    (tmp_path / "out/cast.json").unlink()
    file = tmp_path / "out/model.safetensors"
    tensors = load_file(file)
    del tensors["model.norm.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"has no tensor model\.norm\.weight"):
        load(tmp_path / "out")


def test_a_hubs_name(save_gated: Save, hub: FakeHub, tmp_path: Path) -> None:
    convert(save_gated(tiny_llama()), tmp_path / "out")
    hub.add("org/sparse", tmp_path / "out")
    assert torch.equal(load("org/sparse")(TOKENS).logits, load(tmp_path / "out")(TOKENS).logits)


def test_unknown_tensors_are_named(save_gated: Save, tmp_path: Path) -> None:
    convert(save_gated(tiny_llama()), tmp_path / "out")
    (tmp_path / "out/cast.json").unlink()
    file = tmp_path / "out/model.safetensors"
    save_file({**load_file(file), "other.weight": torch.ones(2)}, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"lacks \[\] or holds unknown \['other.weight'\]"):
        load(tmp_path / "out")
