"""A directory that keeps N of 64 weights, as vLLM runs it through the plugin."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

pytest.importorskip("vllm", reason="comes with the cpu and gpu extras")

from cast_serve.checkpoint.convert import convert  # noqa: E402
from cast_serve.checkpoint.quantization import Quantization  # noqa: E402
from cast_serve.model import load  # noqa: E402
from cast_serve.sparsity.pattern import Pattern  # noqa: E402
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

TOKENS = torch.arange(NUM_TOKENS)[None]


def model() -> PreTrainedModel:
    """Whose MLP has 192 columns: the kernels' last tile of 8 and 4 bits is half a tile."""
    return tiny_llama(
        128,
        intermediate_size=192,
        num_hidden_layers=1,
        num_attention_heads=16,
        num_key_value_heads=4,
        vocab_size=64,
    )


@pytest.mark.parametrize(
    ("pattern", "quantization"),
    [
        *itertools.product(
            ["32:64", "10:16"],
            [
                None,
                Quantization("int8", head="int8"),
                Quantization("int4", scale_group=128, head=None),
                Quantization("int4", scale_group=32, head="int8"),
            ],
        ),
        ("64:64", Quantization("int4", scale_group=64, head="int4")),
    ],
    ids=str,
)
def test_it_answers_as_the_dense_weights_do(
    quantization: Quantization | None, pattern: str, save_pruned: Save, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    source = save_pruned(model(), pattern=Pattern.parse(pattern), is_on_record=True)
    convert(source, out, quantization=quantization)
    logits, products, kernel = run_in_vllm(out)
    assert kernel == "cast::linear64"
    with torch.no_grad():
        expected = load_compressed(out, torch.float32)(TOKENS).logits[0]
        in_transformers = load(out, torch.float32)(TOKENS).logits[0]
    assert relative(logits, expected) < 1e-2  # a rounding of activations may fall the other way
    assert relative(in_transformers, expected) < 1e-2
    layers = {name: product for name, product in products.items() if name != "lm_head"}
    assert len(layers) == 4  # qkv, o, gate and up, down
    for layer, (x, y) in layers.items():
        seen = x if quantization is None else rounded(x)
        assert relative(y, seen @ weight_of(out, layer).T) < EXACT, layer


def wide_config(**changes: object) -> dict[str, Any]:
    sparsity = {
        "format": "sparse-64-bitmask",
        "sparsity_structure": "40:64",
        "targets": ["Linear"],
        "ignore": ["lm_head"],
    }
    return {"quant_method": "compressed-tensors", "sparsity_config": {**sparsity, **changes}}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sparsity_structure": "65:64"}, "'65:64'.*N:64 on"),
        ({"sparsity_structure": "2:4"}, "'2:4'.*N:64 on"),
        ({"sparsity_structure": None}, "None.*N:64 on"),
        ({"targets": ["Conv"]}, r"\['Conv'\]"),
        ({"format": "sparse-24-bitmask"}, "'40:64'.*2:4 on"),
    ],
)
def test_another_structure_is_refused(changes: dict[str, object], message: str) -> None:
    from cast_serve.engine.config import SparseConfig

    with pytest.raises(ValueError, match=message):
        SparseConfig.from_config(wide_config(**changes))


def test_a_gpu_is_offered_the_dense_twin(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.platforms import current_platform

    from cast_serve.engine.config import SparseConfig

    monkeypatch.setattr(type(current_platform), "is_cpu", lambda self: False)
    with pytest.raises(ValueError, match=r"40:64.*GPUs take 2:4.*--dense-twin"):
        SparseConfig.from_config(wide_config())


def test_each_linear_may_keep_another_number_unless_vllm_merges_it() -> None:
    from vllm.model_executor.layers.linear import ReplicatedLinear

    from cast_serve.engine.config import SparseConfig

    kept = {"layers.0.o_proj": 32, "layers.0.q_proj": 24, "layers.1.down_proj": 48}
    config = SparseConfig.from_config(wide_config(kept_of_64=kept))
    config.packed_modules_mapping = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}
    layer = ReplicatedLinear.__new__(ReplicatedLinear)
    draft = ("draft_model.layers.1.down_proj", 48)  # as vLLM names the layers of a draft
    for name, expected in (("layers.0.o_proj", 32), ("layers.1.o_proj", 40), draft):
        method = config.get_quant_method(layer, name)
        assert method is not None
        assert method.stored.kept == expected
    with pytest.raises(ValueError, match=r"layers.0.k_proj.*24.*40.*one linear"):
        config.get_quant_method(layer, "layers.0.qkv_proj")
