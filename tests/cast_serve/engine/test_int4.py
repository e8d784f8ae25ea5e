"""A 4-bit directory, as vLLM runs it through the plugin -> the dequantised model's answers."""

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

pytest.importorskip("vllm", reason="comes with the cpu and gpu extras")

from cast_serve.checkpoint.convert import convert  # noqa: E402
from cast_serve.checkpoint.quantization import Quantization  # noqa: E402
from cast_serve.sparsity.quantize import rounded  # noqa: E402
from cast_train.checkpoint.compressed import load_compressed  # noqa: E402
from tests.cast_serve.conftest import Save  # noqa: E402
from tests.cast_serve.engine.test_fixtures import (  # noqa: E402, F401
    EXACT,
    NUM_TOKENS,
    one_rank,
    relative,
    run_in_vllm,
    weight_of,
)
from tests.cast_serve.tiny import tiny_llama  # noqa: E402

# What vLLM's own imports warn of.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

UP = "model.layers.0.mlp.up_proj"


def model() -> PreTrainedModel:
    """Whose MLP has 96 and 160 columns: the last scale group is partial with 64 and 128."""
    return tiny_llama(
        96,
        intermediate_size=160,
        num_hidden_layers=1,
        num_attention_heads=12,
        num_key_value_heads=4,
        vocab_size=64,
    )


@pytest.mark.parametrize(("scale_group", "head"), [(128, "int8"), (64, None), (32, "int8")])
def test_it_answers_as_the_dequantised_model(
    scale_group: int, head: None, save_pruned: Save, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    convert(
        save_pruned(model()),
        out,
        quantization=Quantization("int4", scale_group=scale_group, head=head),
    )
    logits, products, kernel = run_in_vllm(out)
    assert kernel == "cast::linear24_int4"
    with torch.no_grad():
        expected = load_compressed(out, torch.float32)(torch.arange(NUM_TOKENS)[None]).logits[0]
    assert relative(logits, expected) < 1e-2  # a rounding of activations may fall the other way
    layers = {name: product for name, product in products.items() if name != "lm_head"}
    assert len(layers) == 4  # qkv, o, gate and up, down
    for layer, (x, y) in layers.items():
        assert relative(y, rounded(x) @ weight_of(out, layer).T) < EXACT, layer


@pytest.mark.parametrize(
    ("part", "place", "value", "message"),
    [
        ("weight_packed", None, 0, "gate_up_proj: row 160 of weight_packed is 0, .*160 rows"),
        ("weight_scale", None, 0, "160 of 320 .* in row 160"),
        ("weight_scale", (3, 0), torch.nan, "gate_up_proj.weight_scale: 1 of 320 .* in row 163"),
        ("bitmask", (3, 0), 0xF5, "gate_up_proj: .*row 163, group 1"),
    ],
)
def test_damage_is_named(
    part: str,
    place: tuple[int, int] | None,
    value: float,
    message: str,
    save_pruned: Save,
    tmp_path: Path,
) -> None:
    out = tmp_path / "out"
    convert(save_pruned(model()), out, quantization=Quantization("int4"))
    tensors = load_file(out / "model.safetensors")
    if place is None:
        del tensors[f"{UP}.{part}"]
    else:
        tensors[f"{UP}.{part}"][place] = value
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=re.compile(message)):
        run_in_vllm(out)
