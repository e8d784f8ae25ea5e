"""Every checkpoint of another program, as vLLM runs it through the plugin -> its twin's answers.

The model, its loading, its layers and its logits are vLLM's own, in this process. Only attention is
replaced: the fixtures' heads have 8 columns, and vLLM's attention on CPUs takes 32 at least.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

pytest.importorskip("vllm", reason="comes with the cpu and gpu extras")

from vllm.config import set_current_vllm_config  # noqa: E402
from vllm.distributed import parallel_state  # noqa: E402
from vllm.engine.arg_utils import EngineArgs  # noqa: E402

from cast_serve.checkpoint.convert import convert  # noqa: E402
from cast_serve.checkpoint.inspect import inspect  # noqa: E402
from cast_serve.checkpoint.record import CheckpointError  # noqa: E402
from cast_serve.engine import plugin  # noqa: E402
from cast_serve.sparsity.quantize import rounded  # noqa: E402
from cast_train.checkpoint.models import load_compressed  # noqa: E402

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
AS_IT_IS = ("int8-bitmask",)  # `convert` refuses it: it is in our form already
NUM_TOKENS = 32
ROUNDED, EXACT = 1e-2, 1e-5  # relative errors
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


def run_in_vllm(folder: Path) -> tuple[Tensor, dict[str, Product], str | None]:
    """Token ids 0 to 31 through the served model, in fp32.

    Returns:
        logits [NUM_TOKENS, vocabulary], the product of every 2:4 layer, and the kernel.
    """
    from vllm.model_executor.model_loader import get_model

    from cast_serve.engine.report import report

    settings = EngineArgs(
        model=str(folder),
        dtype="float32",
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


def weight_of(model: nn.Module, name: str) -> Tensor:
    """The weight of a layer as vLLM names it, of which some are several merged."""
    parent, _, last = name.rpartition(".")
    parts = (model.get_submodule(f"{parent}.{part}") for part in MERGED.get(last, (last,)))
    return torch.cat([part.weight.data for part in parts])


def relative(found: Tensor, expected: Tensor) -> float:
    assert found.shape == expected.shape
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("name", SERVED)
def test_it_answers_as_its_dequantised_twin(name: str, tmp_path: Path) -> None:
    folder = FIXTURES / name
    if name not in AS_IT_IS:
        folder = tmp_path / "out"
        convert(FIXTURES / name, folder, tmp_path / "twin")
    # The weights in fp32, of which the twin's are rounded once more, to bf16.
    exact = load_compressed(folder, torch.float32)
    if name in AS_IT_IS:
        twin = exact
        for module in twin.modules():
            module._forward_pre_hooks.clear()  # which round the activations
    else:
        twin = AutoModelForCausalLM.from_pretrained(tmp_path / "twin", dtype=torch.float32)

    logits, products, kernel = run_in_vllm(folder)

    assert kernel == SERVED[name]
    with torch.no_grad():
        expected = twin(torch.arange(NUM_TOKENS)[None]).logits[0]
    assert relative(logits, expected) < ROUNDED
    assert len(products) == 4  # qkv, o, gate and up, down
    for layer, (x, y) in products.items():
        assert relative(y, x @ weight_of(twin, layer).T) < ROUNDED, layer
        multiplied = rounded(x) if kernel == "cast::linear24_int8" else x
        assert relative(y, multiplied @ weight_of(exact, layer).T) < EXACT, layer


def test_every_other_fixture_is_refused(tmp_path: Path) -> None:
    others = {path.name for path in FIXTURES.iterdir() if path.is_dir()} - set(SERVED)
    assert others == {"int4-packed", "int8-zeros-asymmetric"}
    for name in others:
        for read in (inspect, lambda source: convert(source, tmp_path / "out")):
            with pytest.raises(CheckpointError, match=name):
                read(FIXTURES / name)
