"""A 4-bit head, as vLLM runs it through the plugin -> the dequantised head's logits."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

pytest.importorskip("vllm", reason="comes with the cpu and gpu extras")

from cast_serve.checkpoint.convert import convert  # noqa: E402
from cast_serve.checkpoint.head import QuantizedHead  # noqa: E402
from cast_serve.checkpoint.quantization import Quantization  # noqa: E402
from cast_serve.kernels.reference64 import unpack64  # noqa: E402
from cast_serve.sparsity.pattern import Pattern  # noqa: E402
from cast_serve.sparsity.quantize import rounded  # noqa: E402
from cast_train.checkpoint.compressed import load_compressed  # noqa: E402
from tests.cast_serve.conftest import Save  # noqa: E402
from tests.cast_serve.engine.test_fixtures import (  # noqa: E402, F401
    EXACT,
    NUM_TOKENS,
    ROUNDED,
    one_rank,
    relative,
    run_in_vllm,
)
from tests.cast_serve.tiny import tiny_llama  # noqa: E402

# What vLLM's own imports warn of.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

VOCABULARY = 80  # of 128 rows in vLLM, padded


def model() -> PreTrainedModel:
    return tiny_llama(
        192, num_hidden_layers=1, num_attention_heads=24, num_key_value_heads=8, vocab_size=80
    )


@pytest.mark.parametrize(
    ("pattern", "values", "scale_group"),
    [("2:4", "int4", 64), ("40:64", "int4", 32), ("40:64", "int8", 64)],
)
def test_logits_are_those_of_the_dequantised_head(
    pattern: str,
    values: Any,
    scale_group: int,
    save_pruned: Save,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from cast_serve.engine.head import HeadMethod

    apply, heads_x = HeadMethod.apply, []

    def remember(method: HeadMethod, layer: nn.Module, x: Tensor, bias: Any = None) -> Tensor:
        heads_x.append(x.clone())
        return apply(method, layer, x, bias)

    monkeypatch.setattr(HeadMethod, "apply", remember)
    out = tmp_path / "out"
    source = save_pruned(model(), pattern=Pattern.parse(pattern), is_on_record=True)
    convert(source, out, quantization=Quantization(values, scale_group, "int4"))
    logits, _, _ = run_in_vllm(out)
    twin = load_compressed(out, torch.float32).requires_grad_(False)
    expected = twin(torch.arange(NUM_TOKENS)[None]).logits[0]
    assert logits.shape == (NUM_TOKENS, VOCABULARY)
    assert relative(logits, expected) < ROUNDED  # an activation may round the other way
    assert relative(logits, rounded(heads_x[0]) @ twin.lm_head.weight.T) < EXACT


@pytest.mark.parametrize(
    ("part", "place", "value", "message"),
    [
        ("weight_packed", None, 0, "lm_head: row 0 of weight_packed is 0, .*80 rows"),
        ("weight_scale", None, 0, "lm_head.weight_scale: 240 of 240 .* in row 0"),
        ("weight_scale", (3, 1), torch.nan, "lm_head.weight_scale: 1 of 240 .* in row 3"),
        ("weight_shape", (1,), 96, r"lm_head: .* says shape \[80, 96\], but in_features is 192"),
    ],
)
def test_damage_is_named(
    part: str,
    place: tuple[int, ...] | None,
    value: float,
    message: str,
    save_pruned: Save,
    tmp_path: Path,
) -> None:
    out = tmp_path / "out"
    convert(save_pruned(model()), out, quantization=Quantization("int8", 64, "int4"))
    tensors = load_file(out / "model.safetensors")
    if place is None:
        del tensors[f"lm_head.{part}"]
    else:
        tensors[f"lm_head.{part}"][place] = value
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=re.compile(message)):
        run_in_vllm(out)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_has_its_rows(rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """80 rows, padded to 128: 64 and 16 over two ranks, and 48 of padding."""
    from vllm.model_executor import parameter as vllm_parameter
    from vllm.model_executor.layers import vocab_parallel_embedding as vllm_head

    from cast_serve.engine.config import SparseConfig
    from cast_serve.engine.linear import Stored

    for module in (vllm_head, vllm_parameter):
        monkeypatch.setattr(module, "get_tensor_model_parallel_rank", lambda: rank)
        monkeypatch.setattr(module, "get_tensor_model_parallel_world_size", lambda: 2)
    weight = torch.randn(VOCABULARY, 192, generator=torch.Generator().manual_seed(0))
    asked = Quantization("int4", 64, "int4")
    whole = QuantizedHead.from_weight("lm_head", weight.bfloat16(), asked, "lm_head")
    config = SparseConfig([], head=Stored(torch.int8, has_zeros=True, scale_group=64))
    layer = vllm_head.ParallelLMHead(
        VOCABULARY, 192, params_dtype=torch.bfloat16, quant_config=config, prefix="lm_head"
    )
    for name, tensor in whole.tensors().items():
        parameter: nn.Parameter = getattr(layer, name.rpartition(".")[2])
        parameter.weight_loader(parameter, tensor)
    layer.quant_method.process_weights_after_loading(layer)
    assert [name for name, _ in layer.named_parameters()] == ["packed"]
    own = whole.values[64 * rank : 64 * (rank + 1)]
    values, _, scale = unpack64(layer.packed, 64, 192, 64, torch.int8, 64)
    assert scale is not None
    assert torch.equal(values[: len(own)], own)
    assert torch.equal(scale[: len(own)], whole.scale[64 * rank : 64 * (rank + 1)])
    assert not scale[len(own) :].any()
    x = torch.randn(3, 192).bfloat16()
    logits = layer.quant_method.apply(layer, x)
    assert logits.shape == (3, 64)
    assert not logits[:, len(own) :].any()


def test_the_report_names_it() -> None:
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    from cast_serve.engine.report import report

    head = ParallelLMHead.__new__(ParallelLMHead)
    nn.Module.__init__(head)
    head.packed = torch.zeros(1)
    assert report(nn.ModuleList([head]))["head"] == "int8"
    head.cast_scale_group = 64
    assert report(nn.ModuleList([head]))["head"] == "int4"
