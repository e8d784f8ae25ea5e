"""Every checkpoint of another program, as vLLM runs it through the plugin -> its twin's answers.

The model, its loading, its layers and its logits are vLLM's own, in this process. Only attention is
replaced: the fixtures' heads have 8 columns, and vLLM's attention on CPUs takes 32 at least.
"""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

pytest.importorskip("vllm", reason="comes with the cpu and gpu extras")

from vllm.config import set_current_vllm_config  # noqa: E402
from vllm.distributed import parallel_state  # noqa: E402
from vllm.engine.arg_utils import EngineArgs  # noqa: E402

from cast_serve.checkpoint.convert import convert  # noqa: E402
from cast_serve.checkpoint.directory import ModelDirectory  # noqa: E402
from cast_serve.checkpoint.formats import bitmask, eight_bits  # noqa: E402
from cast_serve.checkpoint.inspect import count_sparse, inspect  # noqa: E402
from cast_serve.checkpoint.record import CheckpointError  # noqa: E402
from cast_serve.engine import plugin  # noqa: E402
from cast_serve.sparsity.quantize import rounded  # noqa: E402
from cast_train.checkpoint.compressed import load_compressed  # noqa: E402

# What vLLM's own imports warn of.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

FIXTURES = Path(__file__).parents[1] / "checkpoint/fixtures"
SERVED = {  # the kernel that it runs
    "int8-bitmask": "cast::linear24_int8",
    "int8-bitmask-static": "cast::linear24_int8",
    "int8-zeros": "cast::linear24_int8",
    "float8-bitmask": "cast::linear24",
    "float8-zeros": "cast::linear24",
}
CONVERTED = {  # what only `convert` reads: the kernel of what it becomes
    "int4-packed": "cast::linear24",
    "int4-packed-channel": "cast::linear24_int4",
    "int4-packed-group": "cast::linear24_int4",
    "int8-packed-group": "cast::linear24",
    "int4-marlin-channel": "cast::linear24_int4",
    "int4-marlin-group": "cast::linear24_int4",
    "int8-marlin-channel": "cast::linear24_int8",
    "int8-marlin-group": "cast::linear24",
    "bf16-ragged": "cast::linear64",
    "bf16-ragged-16-32": "cast::linear64",
    "int8-ragged": "cast::linear64",
}
ALREADY_OURS = ("int8-bitmask",)  # `convert` refuses it
NUM_TOKENS = 32
ROUNDED, EXACT = 1e-2, 1e-5  # relative errors
BF16 = 2e-3  # of scales in fp16, which the 4-bit kernel rounds to bf16
MERGED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


class Product(NamedTuple):
    """What one layer was given, [NUM_TOKENS, in_features], and what it returned."""

    x: Tensor
    y: Tensor


class CausalAttention(nn.Module):
    """Of one sequence, without a cache; called as vLLM's is."""

    def __init__(
        self, num_heads: int, head_size: int, scale: float, num_kv_heads: int, **_: Any
    ) -> None:
        super().__init__()
        self.head_size, self.scale = head_size, scale

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        heads = (
            x.view(NUM_TOKENS, -1, self.head_size).transpose(0, 1) for x in (query, key, value)
        )
        attended = nn.functional.scaled_dot_product_attention(
            *heads, is_causal=True, scale=self.scale, enable_gqa=True
        )
        return attended.transpose(0, 1).flatten(1)


@pytest.fixture(autouse=True)
def one_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    plugin.register()
    monkeypatch.setattr("vllm.model_executor.models.llama.Attention", CausalAttention)
    # As vLLM's CPU worker does it.
    monkeypatch.setattr(torch.accelerator, "empty_cache", lambda: None)
    with patch.dict(os.environ):  # vLLM's configuration sets variables
        parallel_state.init_distributed_environment(
            1, 0, f"file://{tmp_path / 'rendezvous'}", 0, backend="gloo"
        )
        yield
        parallel_state.destroy_model_parallel()
        parallel_state.destroy_distributed_environment()


def run_in_vllm(
    folder: Path, dtype: str = "float32"
) -> tuple[Tensor, dict[str, Product], str | None]:
    """Token ids 0 to 31 through the served model, with the flags of `cast-serve worker`.

    Returns:
        logits [NUM_TOKENS, vocabulary], the product of every 2:4 layer, and the kernel.
    """
    from vllm.model_executor.model_loader import get_model

    from cast_serve.engine.claims import METHOD
    from cast_serve.engine.report import report

    settings = EngineArgs(
        model=str(folder),
        dtype=dtype,
        quantization=METHOD if count_sparse(folder)[1] else None,
        enforce_eager=True,
        skip_tokenizer_init=True,
        max_model_len=NUM_TOKENS,
        # The fixtures' config.json does not name it.
        hf_overrides={"architectures": ["LlamaForCausalLM"]},
    ).create_engine_config()
    products: dict[str, Product] = {}

    def remember(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, outputs: Any) -> None:
            products[name] = Product(inputs[0].clone(), outputs[0].clone())

        return hook

    with set_current_vllm_config(settings):
        parallel_state.ensure_model_parallel_initialized(1, 1)
        model = get_model(vllm_config=settings)
        for name, module in model.named_modules():
            if hasattr(module, "packed"):
                module.register_forward_hook(remember(name))
        tokens = torch.arange(NUM_TOKENS)
        with torch.no_grad():
            logits = model.compute_logits(model(tokens, tokens))
    return logits, products, report(model)["kernel"]


def weight_of(folder: Path, name: str) -> Tensor:
    """A layer's weight in fp32 as it is stored; the layer is named by vLLM, which merges some."""
    directory = ModelDirectory(folder)
    parent, _, last = name.rpartition(".")
    linears = [f"{parent}.{part}" for part in MERGED.get(last, (last,))]
    if directory.kind == "quantised":
        parts = (eight_bits.read(each, directory.parts(each), torch.float32) for each in linears)
    else:
        parts = (
            bitmask.read(each, directory.parts(each), torch.float32, directory.pattern_of(each))
            for each in linears
        )
    return torch.cat([linear.dense(torch.float32).float() for linear in parts])


def relative(found: Tensor, expected: Tensor) -> float:
    assert found.shape == expected.shape
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("name", SERVED)
def test_it_answers_as_its_dequantised_twin(name: str, tmp_path: Path) -> None:
    folder = FIXTURES / name
    if name in ALREADY_OURS:
        twin = load_compressed(folder, torch.float32)
        for module in twin.modules():
            module._forward_pre_hooks.clear()  # which round the activations
    else:
        convert(folder, tmp_path / "out", tmp_path / "twin")
        twin = AutoModelForCausalLM.from_pretrained(tmp_path / "twin", dtype=torch.float32)

    logits, products, kernel = run_in_vllm(folder)

    assert kernel == SERVED[name]
    with torch.no_grad():
        expected = twin(torch.arange(NUM_TOKENS)[None]).logits[0]
    assert relative(logits, expected) < ROUNDED
    assert len(products) == 4  # qkv, o, gate and up, down
    for layer, (x, y) in products.items():
        weight = weight_of(folder, layer)
        assert relative(y, x @ weight.T) < ROUNDED, layer
        multiplied = rounded(x) if kernel == "cast::linear24_int8" else x
        assert relative(y, multiplied @ weight.T) < EXACT, layer


@pytest.mark.parametrize("name", CONVERTED)
def test_packed_and_converted_it_answers_as_its_dequantised_twin(name: str, tmp_path: Path) -> None:
    convert(FIXTURES / name, tmp_path / "out", tmp_path / "twin")
    twin = AutoModelForCausalLM.from_pretrained(tmp_path / "twin", dtype=torch.float32)

    logits, products, kernel = run_in_vllm(tmp_path / "out")

    assert kernel == CONVERTED[name]
    with torch.no_grad():
        expected = twin(torch.arange(NUM_TOKENS)[None]).logits[0]
    assert relative(logits, expected) < ROUNDED
    assert len(products) == 4  # qkv, o, gate and up, down
    for layer, (x, y) in products.items():
        is_quantised = ModelDirectory(tmp_path / "out").form.quantized is not None
        multiplied = rounded(x) if is_quantised else x
        error = relative(y, multiplied @ weight_of(tmp_path / "out", layer).T)
        assert error < (BF16 if name.startswith("int4-marlin") else EXACT), layer


@pytest.mark.parametrize("name", [name for name in SERVED if name not in ALREADY_OURS])
def test_converted_it_gives_the_same_logits(name: str, tmp_path: Path) -> None:
    convert(FIXTURES / name, tmp_path / "out")
    for dtype in ("bfloat16", "float32") if name.startswith("int8") else ("bfloat16",):
        logits, _, kernel = run_in_vllm(FIXTURES / name, dtype)
        converted, _, kernel_of_converted = run_in_vllm(tmp_path / "out", dtype)
        assert kernel == kernel_of_converted
        assert torch.equal(logits, converted)


def with_sparsity_dense(folder: Path) -> None:
    """Adds the sparsity_config that vLLM itself refuses."""
    config = json.loads((folder / "config.json").read_text())
    sparsity = {"format": "dense", "targets": ["Linear"], "sparsity_structure": "2:4"}
    quantization = config.get("quantization_config", {"quant_method": "compressed-tensors"})
    config["quantization_config"] = quantization | {"sparsity_config": sparsity}
    (folder / "config.json").write_text(json.dumps(config))


def test_what_is_said_to_be_dense_is_served_if_it_is_quantised(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(FIXTURES / "float8-zeros", tmp_path / "dense"))
    with_sparsity_dense(folder)
    logits, _, kernel = run_in_vllm(folder)
    assert kernel == "cast::linear24"
    assert torch.equal(logits, run_in_vllm(FIXTURES / "float8-zeros")[0])


def test_zeros_in_16_bits_are_to_be_converted(tmp_path: Path) -> None:
    twin = tmp_path / "twin"
    convert(FIXTURES / "float8-zeros", tmp_path / "out", twin)
    (twin / "cast.json").unlink()
    with_sparsity_dense(twin)
    with pytest.raises(ValueError, match="stores the zeros .*; run `cast-serve convert SRC OUT` a"):
        run_in_vllm(twin)


@pytest.mark.parametrize(
    ("name", "tensor", "place", "value", "message"),
    [
        ("float8-bitmask", "weight_scale", None, None, "gate_up_proj.weight_scale: 24 of 48 .* 24"),
        ("float8-zeros", "weight_scale", None, None, "24 of 48 .* the first is 0.0 in row 24"),
        ("float8-bitmask", "weight_scale", 3, torch.nan, "1 of 48 .* is nan in row 27; .*: copy"),
        ("float8-zeros", "weight_scale", 0, -1, "24 of 48 .* the first is -1.0 in row 24"),
        ("float8-bitmask", "compressed", 3, torch.nan, "gate_up_proj: row 27 of its float8 .* NaN"),
        ("float8-bitmask", "bitmask", 3, 0xF5, r"row 27, group 1, with 4; .*: copy the direct"),
        ("int8-zeros", "weight", 3, 1, "gate_up_proj: 4 of 192 groups .* row 27, group 0"),
    ],
)
def test_damage_is_named(
    name: str, tensor: str, place: int | None, value: float, message: str, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(FIXTURES / name, tmp_path / name))
    tensors = load_file(folder / "model.safetensors")
    key = f"model.layers.0.mlp.up_proj.{tensor}"
    if place is None:
        del tensors[key]
    else:
        tensors[key][place] = value
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=message):
        run_in_vllm(folder)


def test_every_other_fixture_is_refused(tmp_path: Path) -> None:
    others = {path.name for path in FIXTURES.iterdir() if path.is_dir()} - {*SERVED, *CONVERTED}
    assert others == {"int4-packed-asymmetric", "int8-zeros-asymmetric"}
    for name in others:
        for read in (inspect, lambda source: convert(source, tmp_path / "out")):
            with pytest.raises(CheckpointError, match=name):
                read(FIXTURES / name)
